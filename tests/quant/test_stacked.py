"""Experts in few bits multiply as the plain loop over dequantized weights does, gradients included, in float64."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  # registers its operator
from torch.nn import functional

from qft.quant import grouped
from qft.quant.hold import SCHEMES
from qft.quant.product import Factors, View, Whole
from qft.quant.stacked import Stacked
from qft.recipe.training import QuantSection
from tests.support.rounding import assert_small_steps_kept

EXPERTS, A, B, RANK = 4, 10, 6, 3
SECTIONS = {
    "nf4": QuantSection(mode="4bit"),
    "fp4": QuantSection(mode="4bit", quant_type="fp4", double_quant=False),
    "8bit": QuantSection(mode="8bit"),
    "none": QuantSection(),
}
ENDS = torch.tensor([2, 2, 5, 7], dtype=torch.int32)
"""Rows of each expert: the second has none, and the last two rows are nobody's."""


def loop(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows [9, in] of each expert times its [in, out]."""
    parts = [x[:2] @ weight[0], x[2:5] @ weight[2], x[5:7] @ weight[3]]
    return torch.cat([*parts, torch.zeros(2, weight.shape[-1], dtype=x.dtype)])


class Way(NamedTuple):
    """A product as models have it, and what it comes to."""

    inputs: tuple[int, ...]
    asked: Callable[[Any, torch.Tensor], torch.Tensor]
    plain: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


WAYS = {
    "linear": Way((5, B), lambda w, x: functional.linear(x, w[torch.tensor(2)]), lambda w, x: x @ w[2].mT),
    "no rows": Way((0, A), lambda w, x: x @ w[1], lambda w, x: x @ w[1]),
    "matmul": Way((3, 5, A), lambda w, x: x @ w[1], lambda w, x: x @ w[1]),
    "bmm": Way((EXPERTS, 5, A), lambda w, x: torch.bmm(x, w), lambda w, x: x @ w),
    "batched_mm": Way(
        (3, B, 1), lambda w, x: torch.bmm(w[torch.tensor([3, 0, 3])], x), lambda w, x: w[[3, 0, 3]] @ x
    ),
    "grouped_mm": Way(
        (9, A), lambda w, x: functional.grouped_mm(x, w, offs=ENDS), lambda w, x: loop(x, w)
    ),
    "grouped_mm transposed": Way(
        (9, B), lambda w, x: functional.grouped_mm(x, w.transpose(-2, -1), offs=ENDS), lambda w, x: loop(x, w.mT)
    ),
    "grouped_mm_fallback": Way(
        (9, B),
        lambda w, x: torch.ops.transformers.grouped_mm_fallback(x, w.transpose(-2, -1), offs=ENDS),
        lambda w, x: loop(x, w.mT),
    ),
    "loop": Way((EXPERTS, B), lambda w, x: torch.stack([functional.linear(r, e) for r, e in zip(x, w, strict=True)]),
                lambda w, x: (w @ x[..., None])[..., 0]),
    "any other": Way((5, B), lambda w, x: torch.einsum("nb,eab->ena", x, w), lambda w, x: x @ w.mT),
}  # fmt: skip


def stack(how: str, weight: torch.Tensor) -> Any:
    """What holds the weights."""
    scheme: Any = SCHEMES[SECTIONS[how].mode](SECTIONS[how], "float32", ())
    return Whole(weight) if how == "none" else scheme.stack(weight)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", SECTIONS)
def test_values_and_gradients_are_those_of_a_loop(how: str, way: str) -> None:
    torch.manual_seed(0)
    store = stack(how, torch.randn(EXPERTS, A, B))
    read = store.reader(torch.float64)
    held = read(0, EXPERTS)
    left, right = torch.randn(EXPERTS, A, RANK).double(), torch.randn(EXPERTS, RANK, B).double()
    x = torch.randn(WAYS[way].inputs, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (left, right, x)]
    made = WAYS[way].asked(Stacked(View(store, torch.float64, None, Factors(left, right, 0.5))), x)
    meant = WAYS[way].plain(held + 0.5 * left @ right, x)
    gradient = torch.randn_like(meant)
    torch.testing.assert_close(made, meant)
    torch.testing.assert_close(
        torch.autograd.grad(made, leaves, gradient), torch.autograd.grad(meant, leaves, gradient)
    )


@pytest.mark.parametrize("how", ["nf4", "fp4", "8bit"])
def test_what_is_held_is_near_the_weights_and_takes_what_is_foretold(how: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 40, 50)  # whose rows end within blocks of 64
    store, foretold = stack(how, weight), stack(how, weight.to("meta"))
    lost = store.reader(torch.float32)(0, 3) - weight
    assert lost.abs().mean() < {"nf4": 0.08, "fp4": 0.11, "8bit": 0.01}[how]
    sizes = [{name: (t.shape, t.dtype) for name, t in each.tensors.items()} for each in (store, foretold)]
    assert sizes[0] == sizes[1]


def test_a_parameter_says_what_it_stands_for() -> None:
    scheme = SCHEMES["4bit"](SECTIONS["nf4"], "bfloat16", ())
    held = scheme.stacked(torch.randn(3, 8, 64, dtype=torch.bfloat16))
    module = torch.nn.Module()
    module.weight = held
    module.to("cpu")
    assert [*dict(module.named_parameters())] == ["weight"]
    assert (held.shape, held.dtype, held.numel()) == ((3, 8, 64), torch.bfloat16, 3 * 8 * 64)
    assert module.weight is held
    assert not held.requires_grad


@pytest.mark.parametrize("way", ["bmm", "grouped_mm", "grouped_mm transposed"])
@pytest.mark.parametrize("at_once", [1, 400, 2**25])
def test_the_kernel_of_a_gpu_comes_to_the_same(at_once: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 and on a CPU, which has it too: one expert at a time, two, all."""
    torch.manual_seed(0)
    weight = torch.randn(EXPERTS, 8, 8, dtype=torch.bfloat16)
    left, right = torch.randn(EXPERTS, 8, 8), torch.randn(EXPERTS, 8, 8)
    x = torch.randn(*WAYS[way].inputs[:-1], 8, dtype=torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in (left, right, x)]
    gradient = torch.randn(WAYS[way].plain(weight, x).shape, dtype=torch.bfloat16)
    monkeypatch.setattr(grouped, "AT_ONCE", at_once)
    found = []
    for kernels in (set[str](), {"cpu"}):
        monkeypatch.setattr(grouped, "KERNELS", kernels)
        made = WAYS[way].asked(Stacked(View(stack("8bit", weight), x.dtype, None, Factors(left, right, 0.5))), x)
        gradients = torch.autograd.grad(made, leaves, gradient)
        meant = slice(-2) if way.startswith("grouped") else slice(None)  # the last two rows are nobody's
        found.append((made[meant], *gradients[:2], gradients[2][meant]))
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.1)


def test_an_adapter_s_first_small_steps_are_not_lost_in_rounding() -> None:
    torch.manual_seed(0)
    weight = (torch.randn(2, 256, 256) / 16).to(torch.bfloat16)
    left, right = torch.randn(2, 256, 8) / 16, torch.randn(2, 8, 256) * 1e-4
    x = torch.randn(2048, 256, dtype=torch.bfloat16).requires_grad_()
    slopes = torch.randn(2048, 256, dtype=torch.bfloat16)
    made = x @ Stacked(View(Whole(weight), torch.bfloat16, None, Factors(left, right, 0.5)))[1]
    [of_x] = torch.autograd.grad(made, x, slopes)
    whole, delta = weight[1].double(), 0.5 * left[1].double() @ right[1].double()
    with torch.no_grad():
        assert_small_steps_kept(made, x.double() @ whole, x.double() @ delta)
        assert_small_steps_kept(of_x, slopes.double() @ whole.t(), slopes.double() @ delta.t())


@pytest.mark.parametrize("how", SECTIONS)
def test_what_a_product_made_is_freed_with_it(how: str) -> None:
    """Not when Python looks for cycles, which is some steps later, of memory that nobody predicted."""
    weights = stack(how, torch.randn(EXPERTS, A, B))
    x = torch.randn(9, A, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        functional.grouped_mm(x, Stacked(View(weights, torch.float32)), offs=ENDS).sum().backward()  # type: ignore[no-untyped-call]
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert not [found for found in gc.garbage if isinstance(found, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
