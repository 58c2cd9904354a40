"""Tiny random mixtures of experts, by what tells them apart: how their experts are stored, called and computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.support.models import byte_tokenizer

SHAPE = {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
SHAPE |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
FOUR = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1}
ROUTED |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
LINEAR |= {"linear_value_head_dim": 16, "shared_expert_intermediate_size": 64}

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", SHAPE | {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", SHAPE | FOUR),
    "gpt_oss": ("GptOss", SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64}),
    "deepseek_v3": ("DeepseekV3", SHAPE | {"num_key_value_heads": 4} | LATENT | ROUTED),
    "glm4_moe": ("Glm4Moe", SHAPE | ROUTED),
    "olmoe": ("Olmoe", SHAPE | FOUR),
    "granitemoe": ("GraniteMoe", SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4_text": ("Llama4Text", SHAPE | {"intermediate_size_mlp": 64, "num_local_experts": 4}),
    "qwen3_next": ("Qwen3Next", SHAPE | FOUR | LINEAR | {"layer_types": ["linear_attention", "full_attention"]}),
    "jetmoe": ("JetMoe", SHAPE | {"kv_channels": 16, "num_local_experts": 4}),
}
"""Name of the configuration's class, and what it is given."""


def mixture(kind: str, **changes: Any) -> Any:
    """Float32, with weights large enough that experts differ."""
    name, settings = MIXTURES[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for key, value in model.named_parameters():
        if value.ndim == 3 or "router" in key or "gate.weight" in key:
            torch.nn.init.normal_(value, std=0.1)
    return model.eval()


def write_mixture(folder: Path, kind: str, **changes: Any) -> Path:
    """By the names on disk that the family is published with, and the byte tokenizer."""
    mixture(kind, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
