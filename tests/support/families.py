"""Tiny random models of families whose checkpoints have other names, or shapes, than their modules have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.support.models import byte_tokenizer

COMMON = {"vocab_size": 264, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
COMMON |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2, "hidden_size": 64}
SMALL = COMMON | {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURES = TOWER | {"image_size": 28, "patch_size": 14}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", SMALL | {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", SMALL | EXPERTS),
    "gpt_neox": ("GPTNeoX", COMMON | {"intermediate_size": 128}),
    "gpt2": ("GPT2", COMMON | {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "gemma3": ("Gemma3", {"text_config": SMALL | {"sliding_window": 64}, "vision_config": PICTURES}),
}
"""Name of the configuration's class, and what it is given."""
ATTENTION = {"gpt_neox": ["query_key_value"], "gpt2": ["c_attn"]}
"""Linear layers to adapt where they are called otherwise than q_proj and v_proj."""


def tiny(family: str) -> Any:
    """Float32, with norms and biases that are not those of a model that nobody has trained."""
    kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**settings))
    for name, value in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(value, mean=float("norm" in name and "bias" not in name), std=0.1)
    return model.eval()


def write_tiny(family: str, folder: Path) -> Path:
    """By the names on disk that the family is published with."""
    tiny(family).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
