"""What a CPU computes in fewer passes is what the libraries compute."""

from __future__ import annotations

from functools import partial
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from qft.model.on_cpu import SHORT, join_adapters, short_attention
from tests.support.architectures import MODELS
from tests.support.models import tiny_llama
from tests.support.rounding import assert_small_steps_kept

IDS = torch.randint(0, 264, (2, 24), generator=torch.Generator().manual_seed(0))


def adapted(kind: str = "llama", **lora: Any) -> Any:
    """In bfloat16, with adapters in float32 whose B is not zero."""
    torch.manual_seed(0)
    base = (tiny_llama() if kind == "llama" else MODELS[kind]()).to(torch.bfloat16)
    settings = {"target_modules": "all-linear", "init_lora_weights": False, "r": 4} | lora
    return get_peft_model(base, LoraConfig(**settings, task_type="CAUSAL_LM")).train()


def step(model: Any, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)  # for dropout, which draws the same for all ways
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_joined_layers_learn_what_they_would_apart(kind: str, dropout: float) -> None:
    model = adapted(kind, lora_dropout=dropout)
    exact = step(adapted(kind, lora_dropout=dropout).float(), torch.float32)[1]
    loss, slopes = step(model)
    layers = sum(hasattr(module, "lora_A") for module in model.modules())
    assert join_adapters(model) == layers > 4
    other, joined = step(model)
    torch.testing.assert_close(other, loss, rtol=5e-3, atol=0)
    assert joined.keys() == slopes.keys()
    error, before = (
        torch.cat([(found[name].float() - exact[name]).flatten() for name in exact]).norm()
        for found in (joined, slopes)
    )
    assert error <= 1.2 * before


def test_what_comes_out_of_a_joined_layer_may_be_added_to_in_its_place() -> None:
    """As the code of Llama 4 does, whose layers are given rows of tokens."""
    model = adapted()
    join_adapters(model)
    layer = model.base_model.model.model.layers[0].mlp.gate_proj
    for shape in ((3, 5, layer.in_features), (7, layer.in_features)):
        x = torch.randn(shape, dtype=torch.bfloat16)
        made = layer(x)
        made.add_(1).sum().backward()
    assert layer.lora_A["default"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}], ids=str)
def test_adapters_of_another_kind_stay_as_they_are(lora: dict[str, Any]) -> None:
    assert join_adapters(adapted("phi", **lora)) == 0


def test_transposed_layers_stay_as_they_are() -> None:
    assert join_adapters(adapted("gpt2")) == 0


def test_what_is_no_training_takes_the_library_s_path() -> None:
    model = adapted()
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        join_adapters(model)
        assert torch.equal(model(input_ids=IDS).logits, expected)
        with model.disable_adapter():
            plain = model.train()(input_ids=IDS).logits
    assert not torch.equal(plain, expected)
    model.merge_and_unload()


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_written_out_is_attention(heads: int, scale: float | None) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, 9, 8, dtype=torch.bfloat16, requires_grad=True)
    key, value = (torch.randn(2, heads, 9, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    given: dict[str, Any] = {"is_causal": True, "enable_gqa": heads < 4, "scale": scale, "dropout_p": 0.0}

    def of(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        functional: Any = torch.nn.functional
        out = functional.scaled_dot_product_attention(*tensors, **given)
        return out, *torch.autograd.grad(out.float().square().sum(), tensors)

    exact = of(*(each.detach().double().requires_grad_() for each in (query, key, value)))
    torchs = of(query, key, value)
    with short_attention():
        own = of(query, key, value)
    assert torch.nn.functional.scaled_dot_product_attention is scaled_dot_product_attention
    assert "Dot" in type(torchs[0].grad_fn).__name__ != type(own[0].grad_fn).__name__
    for one, other, right in zip(own, torchs, exact, strict=True):
        assert (one.double() - right).norm() <= 1.2 * (other.double() - right).norm() + 1e-3 * right.norm()


@pytest.mark.parametrize(
    "changes",
    [
        {"is_causal": False},
        {"dropout_p": 0.1},
        {"attn_mask": torch.ones(9, 9, dtype=torch.bool).tril(), "is_causal": False},
    ],
    ids=["all", "dropout", "mask"],
)
def test_other_attention_stays_torch_s(changes: dict[str, Any]) -> None:
    query = torch.randn(1, 2, 9, 8, dtype=torch.bfloat16)
    with short_attention():
        for each in (query, query.float(), torch.randn(1, 2, SHORT + 1, 8, dtype=torch.bfloat16)):
            given: dict[str, Any] = {"is_causal": True} | (changes if each is query else {})
            torch.manual_seed(0)
            own = torch.nn.functional.scaled_dot_product_attention(each, each, each, **given)
            torch.manual_seed(0)
            assert torch.equal(own, scaled_dot_product_attention(each, each, each, **given))


@pytest.mark.parametrize(("asked", "changes"), [(torch.bfloat16, True), (torch.float32, False)])
def test_a_layer_in_4_bits_multiplies_in_the_dtype_that_is_asked(asked: torch.dtype, changes: bool) -> None:
    torch.manual_seed(0)
    base = bnb.nn.Linear4bit(64, 128, bias=True, compute_dtype=asked, quant_type="nf4")
    model: Any = torch.nn.Sequential(base).to("cpu", torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"], init_lora_weights=False, r=4)).train()
    x = torch.randn(7, 64, dtype=torch.bfloat16, requires_grad=True)

    def found() -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            out = adapted(x)
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        return out, *torch.autograd.grad(out.float().square().sum(), (x, *trained))

    apart = found()
    assert join_adapters(adapted)
    joined = found()
    assert any(not torch.equal(*pair) for pair in zip(apart, joined, strict=True)) is changes
    for one, other in zip(joined, apart, strict=True):
        assert (one - other).norm() <= 0.01 * other.norm()


@pytest.mark.parametrize(("bias", "dropout"), [(False, 0.0), (True, 0.0), (False, 0.3)])
def test_an_adapter_s_first_small_steps_are_not_lost_in_rounding(bias: bool, dropout: float) -> None:
    torch.manual_seed(0)
    holder: Any = torch.nn.ModuleDict({"wide": torch.nn.Linear(256, 256, bias=bias, dtype=torch.bfloat16)})
    lora = LoraConfig(target_modules=["wide"], r=8, lora_dropout=dropout)
    layer: Any = get_peft_model(holder, lora).train().base_model.model["wide"]
    a, b = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B"))
    b.data.uniform_(-1e-4, 1e-4)
    x = torch.randn(2048, 256).to(torch.bfloat16).requires_grad_()
    slopes = torch.randn(2048, 256).to(torch.bfloat16)
    assert join_adapters(holder) == 1
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        made = layer(x)
    [of_x] = torch.autograd.grad(made, x, slopes)
    torch.manual_seed(1)
    left = torch.nn.functional.dropout(torch.ones_like(x), dropout).double()
    with torch.no_grad():
        base, a, b = layer.base_layer.double(), a.double(), b.double()
        assert_small_steps_kept(made, base(x.double()), (x * left) @ a.t() @ b.t())
        assert_small_steps_kept(of_x, slopes.double() @ base.weight, (slopes.double() @ b @ a) * left)


def test_what_dropout_left_is_left_again_where_it_is_computed_again() -> None:
    model = adapted(lora_dropout=0.3)
    join_adapters(model)
    layer = model.base_model.model.model.layers[0].mlp.gate_proj
    x = torch.randn(9, layer.in_features).to(torch.bfloat16).requires_grad_()
    found = []
    for way in (layer, partial(checkpoint, layer, use_reentrant=False)):
        torch.manual_seed(0)
        made = way(x)
        torch.manual_seed(1)
        found.append((made, *torch.autograd.grad(made.square().sum(), (x, layer.lora_A["default"].weight))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
