"""Models whose tokenizer llama.cpp loads, and GGUF files read back by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from qft.checkpoint.quick_gguf import quick_gguf
from tests.support.models import CHATML, package_model


def tokenizer_of(pre: Any = None, merges: Any = (("a", "b"),), **model: Any) -> Any:
    """A byte-level tokenizer with one merge, which llama.cpp wants."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
    words = special + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(merge) for merge in merges]
    made = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=list(merges), **model))
    made.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|bos|>", eos_token="<|im_end|>")
    fast.chat_template = CHATML
    return fast


def saved(model: Any, folder: Path, tokenizer: Any = None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or tokenizer_of()).save_pretrained(folder)
    return folder


def qwen(kind: str, **changes: Any) -> Any:
    torch.manual_seed(1)
    settings = {
        "vocab_size": 264, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 16,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**settings | changes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, value in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(value, mean=float("norm" in name), std=0.3)
    return model


def read_back(path: Path) -> Any:
    with quick_gguf():
        return AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=transformers.GgufConfig(dequantize=True),
        ).eval()


def save_package_model(folder: Path) -> None:
    """The package model and its tokenizer, as transformers reads them of the GGUF file."""
    source = package_model()
    with quick_gguf():
        model, tokenizer = read_back(source), AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model.config.architectures = ["LlamaForCausalLM"]
    saved(model, folder, tokenizer)
