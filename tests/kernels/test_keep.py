"""Blocks that keep less learn the same, to the bit; and layers that are given float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qft.documents.plan import Kept
from qft.kernels import keep
from tests.support.architectures import MODELS, WIDE
from tests.support.kernels import adapted, fused, gradients, total_error
from tests.support.models import tiny_llama

IDS = torch.arange(66).view(2, 33)
BF16 = torch.bfloat16


class Elsewhere:
    """Where tensors wait as copies; counts them."""

    def __init__(self) -> None:
        self.packed = self.unpacked = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.packed += 1
        return tensor.clone()

    def unpack(self, kept: torch.Tensor) -> torch.Tensor:
        self.unpacked += 1
        return kept


def kept_bytes(model: Any) -> int:
    """Of activations that a forward pass keeps by autograd."""
    kept: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(input_ids=IDS, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def test_what_is_made_again_is_what_was_kept() -> None:
    model = adapted(tiny_llama())
    applied = fused(model)
    assert len(applied.keeps) == 2
    wanted = {name: value.clone() for name, value in gradients(model, IDS).items()}
    kept = [kept_bytes(model)]
    ways: list[list[Kept]] = [["products"] * 2, ["attention", "products"], ["attention"] * 2, ["inputs"] * 2]
    for way in ways:
        keep(applied.keeps, way)
        kept.append(kept_bytes(model))
        stash = Elsewhere()
        keep(applied.keeps, way, stash)
        found = gradients(model, IDS)
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        # Two norms of each block; one that is computed again keeps what it makes, and its input waits by itself.
        assert stash.packed == stash.unpacked == 2 * sum(each != "inputs" for each in way)
    assert kept[0] > kept[1] > kept[2] > kept[3]
    assert kept[4] == kept[0]


@pytest.mark.parametrize("kind", ["gemma2", "qwen2", "qwen3", "olmo2", "mixtral", "cohere", "stablelm"])
def test_so_it_is_in_other_families(kind: str) -> None:
    """Norms behind attention and MLP, of queries and keys, biased products, experts, layer norms."""
    torch.manual_seed(0)
    asked = WIDE | {"num_key_value_heads": 2, "head_dim": 16, "attention_bias": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **asked))
    model = adapted(model, torch.float32 if kind == "mixtral" else torch.float64)
    applied = fused(model)
    wanted = {name: value.clone() for name, value in gradients(model, IDS).items()}
    for way in ("products", "attention"):
        keep(applied.keeps, [way] * len(applied.keeps), Elsewhere())
        found = gradients(model, IDS)
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_what_is_gone_is_not_made_of_anything_else() -> None:
    model = adapted(tiny_llama())
    applied = fused(model)
    keep(applied.keeps, ["products"] * 2)
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no second backward pass"):
        loss.backward()


def test_a_norms_output_that_was_changed_is_kept_itself() -> None:
    model = adapted(tiny_llama())
    applied = fused(model)
    hook = model.get_base_model().model.layers[0].input_layernorm.register_forward_hook(lambda _, __, out: out.mul_(2))
    wanted = {name: value.clone() for name, value in gradients(model, IDS).items()}
    keep(applied.keeps, ["attention"] * 2)
    found = gradients(model, IDS)
    hook.remove()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("kind", ["gpt_neox", "phi", "opt"])
def test_layers_behind_norms_in_float32_are_fused_and_no_less_exact(kind: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]()
    for module in model.modules():
        if not isinstance(module, torch.nn.LayerNorm):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(BF16)
    model = adapted(model.requires_grad_(False), None)
    exactly = gradients(copy.deepcopy(model).float(), IDS)
    plain = {name: value.clone() for name, value in gradients(model, IDS, BF16).items()}
    applied = fused(model, BF16)
    assert applied.fused["linear layers"] >= 8
    assert not applied.plain
    found = gradients(model, IDS, BF16)
    errors = [total_error(own, exactly) for own in (found, plain)]
    assert errors[0] <= 1.2 * errors[1]
