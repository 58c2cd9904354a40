"""llama.cpp's converter where it is installed, and a tokenizer of SentencePiece's BPE as Gemma has one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

CONVERTER = Path(os.environ.get("QFT_CONVERTER", Path(__file__).parents[2] / ".converter"))
"""Where `make setup` puts it."""
needs_converter = pytest.mark.skipif(
    not (CONVERTER / "convert_hf_to_gguf.py").is_file(), reason=f"llama.cpp's converter is not in {CONVERTER}"
)
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
MERGES = [("i", "t"), ("▁", "it"), ("i", "s"), ("▁", "is"), ("s", "a"), ("sa", "y")]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)


def piece_tokenizer() -> Any:
    """BPE over characters with ▁ for spaces, and bytes for what it does not know; BOS before each text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz0123456789.,\n"]
    vocabulary = {token: number for number, token in enumerate([*tokens, *(a + b for a, b in MERGES)])}
    model = models.BPE(vocab=vocabulary, merges=MERGES, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    own = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **own)
    fast.chat_template = TEMPLATE
    return fast


def write_gemma3(folder: Path) -> Path:
    """A random Gemma 3; of six layers, of which llama.cpp takes the last alone to see everything."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    tokenizer = piece_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<unused0>"]})  # which llama.cpp takes for padding
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512, "sliding_window": 64}
    ids = {"bos_token_id": 2, "eos_token_id": [1, 5], "pad_token_id": 0}
    config = Gemma3TextConfig(vocab_size=len(tokenizer), query_pre_attn_scalar=32, **sizes, **ids)
    Gemma3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
