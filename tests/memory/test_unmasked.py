"""Whether padding on the right needs a mask is seen by trying."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qft.memory.unmasked import needs_no_mask
from tests.support.architectures import MODELS
from tests.support.models import tiny_llama


@pytest.mark.parametrize("kind", MODELS)
def test_causal_attention_needs_none(kind: str) -> None:
    model = MODELS[kind]()
    model.train()
    assert needs_no_mask(model)
    assert model.training


def test_tokens_that_see_what_follows_them_need_one() -> None:
    model: Any = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.config._attn_implementation = "sdpa"
    assert not needs_no_mask(model)


def test_a_loss_that_balances_experts_needs_one() -> None:
    assert not needs_no_mask(MODELS["mixtral"](output_router_logits=True))


def test_a_model_that_fails_without_one_needs_one() -> None:
    model: Any = tiny_llama()
    forward = model.forward

    def strict(attention_mask: Any = None, **given: Any) -> Any:
        if attention_mask is None:
            raise ValueError("attention_mask, please")
        return forward(attention_mask=attention_mask, **given)

    model.forward = strict
    assert not needs_no_mask(model)


@pytest.mark.parametrize("kind", ["gemma3_text", "mistral"])
def test_gradients_are_the_same_without_one_beyond_a_window(kind: str) -> None:
    torch.manual_seed(0)
    settings = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8}
    config = AutoConfig.for_model(kind, **settings, num_hidden_layers=2, num_key_value_heads=2, sliding_window=6)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert needs_no_mask(model)
    ids = torch.randint(0, 96, (2, 20))
    mask = (torch.arange(20) < torch.tensor([[20], [9]])).long()
    found = []
    for given in ({"attention_mask": mask}, {}):
        model.zero_grad()
        model(input_ids=ids, labels=ids.masked_fill(mask == 0, -100), **given).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
