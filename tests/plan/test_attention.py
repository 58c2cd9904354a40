"""Attention whose scores are capped, which torch's own kernel leaves out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from qft.errors import RecipeError
from qft.model.load import load_base
from qft.plan import plan_model
from qft.recipe import load
from tests.support.gguf import saved
from tests.support.models import tiny_llama

IDS = torch.arange(24)[None]


@pytest.fixture
def capped(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = tiny_llama().config.to_dict() | {"head_dim": 16, "attn_logit_softcapping": 0.1, "query_pre_attn_scalar": 1}
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        *("num_key_value_heads", "attn_logit_softcapping", "query_pre_attn_scalar", "eos_token_id", "pad_token_id"),
    )
    return saved(Gemma2ForCausalLM(Gemma2Config(**{name: config[name] for name in names})), tmp_path / "capped")


def test_scores_are_capped_whatever_transformers_would_choose(capped: Path, recipe_file: Callable[..., Path]) -> None:
    path = recipe_file(model={"path": str(capped), "dtype": "float32"}, quant=None)
    found = load_base(plan_model(load(path)))
    wanted = Gemma2ForCausalLM.from_pretrained(capped, attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, wanted(IDS).logits)


def test_attention_without_a_cap_is_refused_for_them(capped: Path, recipe_file: Callable[..., Path]) -> None:
    path = recipe_file(model={"path": str(capped), "attn_implementation": "sdpa"}, quant=None)
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: model.attn_implementation: sdpa leaves out the soft cap"):
        plan_model(load(path))
