"""Tiny random models of several architectures, by what tells them apart: names, fused layers, tables of positions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.support.models import byte_tokenizer, tiny_llama

SHAPE = {"vocab_size": 264, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
WIDE = SHAPE | TOKENS | {"intermediate_size": 128, "max_position_embeddings": 256}


def _made(kind: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    name = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    return getattr(transformers, f"{kind}{name}")(getattr(transformers, f"{kind}Config")(**settings))


MODELS: dict[str, Callable[..., Any]] = {
    "llama": tiny_llama,
    # Linear layers are Conv1D, whose weights are transposed; positions are a table; the head is the embedding.
    "gpt2": lambda **changes: _made("GPT2", SHAPE | TOKENS | {"n_positions": 256} | changes),
    "gpt_neox": lambda **changes: _made("GPTNeoX", WIDE | changes),
    "phi": lambda **changes: _made("Phi", WIDE | changes),
    # Experts are parameters of three dimensions, and no layers.
    "mixtral": lambda **changes: _made("Mixtral", WIDE | {"num_key_value_heads": 2, "num_local_experts": 4} | changes),
    # The table of positions begins two rows late.
    "opt": lambda **changes: _made("OPT", WIDE | {"word_embed_proj_dim": 64, "ffn_dim": 128} | changes),
    # Its linear layers are a subclass, which bitsandbytes passes over.
    "falcon": lambda **changes: _made("Falcon", SHAPE | TOKENS | changes),
    "bloom": lambda **changes: _made("Bloom", SHAPE | TOKENS | changes),
}


def write_model(folder: Path, kind: str, **changes: Any) -> Path:
    """The model of that architecture with the byte tokenizer."""
    MODELS[kind](**changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
