"""Products in float8, as a CPU emulates them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from qft.commands.train import train
from qft.kernels import FLOAT8
from qft.kernels.buffers import SCRATCH
from qft.kernels.float8 import E4M3, Dither, Factor, largest, power_for, write
from qft.kernels.layer import Layer, Stack, layer_of
from qft.kernels.mlp import Mlp
from qft.kernels.project import project, project_joint
from qft.kernels.rounding import rounded
from qft.progress import Step, View
from qft.recipe import load
from tests.support.kernels import KINDS, adapted, fused, gradients, largest_error
from tests.support.models import tiny_llama
from tests.support.runs import HARD

DOUBLE = torch.float64


def of_four_bits(*shape: int) -> torch.Tensor:
    """Numbers that float8 holds as they are."""
    return torch.randint(-15, 16, shape).to(DOUBLE)


def stacks(*shapes: tuple[int, int], bias: bool = False) -> Stack:
    """Layers (rows, columns) of such weights; the second has no adapter."""
    inner = nn.ModuleList(nn.Linear(columns, rows, bias=bias) for rows, columns in shapes).requires_grad_(False)
    model = adapted(inner, target_modules=[str(i) for i in range(len(shapes)) if i != 1], r=3)
    made = [layer_of(module) for module in model.base_model.model]
    for layer in made:
        assert isinstance(layer, Layer)
        layer.base.weight.copy_(of_four_bits(layer.rows, layer.columns))
    return Stack(made)  # type: ignore[arg-type]


def results(stack: Stack, run: Any, x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    pairs = [tensor for tensor in stack.pairs if tensor is not None]
    x = x.clone().requires_grad_()
    out = run(x)
    return [out, *torch.autograd.grad(out, [x, *pairs], g)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_what_float8_holds_is_multiplied_exactly_and_so_are_all_gradients(bias: bool, joint: bool) -> None:
    torch.manual_seed(0)
    stack = stacks((16, 32), (48, 32), (32, 32), bias=bias)
    x, g = of_four_bits(2, 5, 32), of_four_bits(2, 5, 96)

    def run(x: torch.Tensor) -> torch.Tensor:
        return project_joint(x, stack, kept=False) if joint else torch.cat(project(x, stack), -1)

    wanted = results(stack, run, x, g)
    assert stack.why_not_float8() is None
    stack.float8 = stack.both_ways = True
    for place in SCRATCH._places.values():
        place.fill_(torch.nan)
    for found, other in zip(results(stack, run, x, g), wanted, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-12, atol=1e-12)


def test_other_numbers_keep_four_bits_in_output_and_gradients() -> None:
    torch.manual_seed(0)
    gate_up, down = stacks((64, 48), (64, 48)), stacks((48, 64))
    mlp = Mlp(gate_up, down, "silu")
    for stack in (gate_up, down):
        for layer in stack.layers:
            nn.init.normal_(layer.base.weight, 0, 0.1)
    x, g = torch.randn(2, 40, 48, dtype=DOUBLE), torch.randn(2, 40, 48, dtype=DOUBLE)
    wanted = results(gate_up, mlp, x, g)
    gate_up.float8 = gate_up.both_ways = down.float8 = True
    errors = [
        float((a - b).detach().norm() / b.detach().norm())
        for a, b in zip(results(gate_up, mlp, x, g), wanted, strict=True)
    ]
    assert all(0.005 < error < 0.08 for error in errors), errors


def test_rows_have_scales_of_their_own_and_what_is_not_finite_stays_so() -> None:
    x = torch.tensor([[1e-30, -3e-30], [60000, 1], [0, 0], [torch.inf, 1], [torch.nan, 1]], dtype=torch.bfloat16)
    for dither in (1.0, 1.3):
        found = rounded(x, Factor(8.0, dither))
        assert found.numbers.dtype == E4M3
        back = found.numbers.float() * found.scales / 8
        finest = found.scales[:3] / 8 * 2**-10
        assert ((back - x.float())[:3].abs() <= torch.maximum(x[:3].float().abs() * 2**-4, finest)).all()
        assert back[3:].isnan().all()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_in_float8(kind: str) -> None:
    weight = torch.randn(32, 128)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type=kind, compress_statistics=True)
    scale = float(power_for(largest(packed, state)))
    wanted = bnb.functional.dequantize_4bit(packed, state)
    for turned in (False, True):
        out = torch.empty(*((128, 32) if turned else (32, 128)), dtype=E4M3)
        write([(packed, state)], out, scale, turned=turned)
        torch.testing.assert_close(
            (out.t() if turned else out).float() * scale, wanted, rtol=2**-4, atol=scale * 2**-10
        )


def test_what_is_frozen_is_rounded_otherwise_in_each_step_and_right_in_the_mean() -> None:
    torch.manual_seed(0)
    stack, x = stacks((64, 48)), of_four_bits(40, 48)
    stack.layers[0].base.weight.normal_()
    exactly = project_joint(x, stack)
    stack.float8 = stack.both_ways = True

    def off(step: int) -> torch.Tensor:
        stack.dither = partial(Dither(step).of, 3)
        return (project_joint(x, stack) - exactly).detach()

    each = torch.stack([off(step) for step in range(64)])
    assert torch.equal(off(5), each[5]), "of a block that is computed again"
    assert each.mean(0).norm() < 0.2 * each[0].norm()


def test_each_step_begins_with_scales_of_its_own() -> None:
    applied = fused(adapted(tiny_llama()), kinds=(*KINDS, FLOAT8))
    stacks = [stack for of_kind in applied.stacks.values() for stack in of_kind]
    scales = []
    for step in (1, 2, 1):
        applied.dither.step = step
        scales.append([stack.dither(part) for stack in stacks for part in range(3)])
    assert scales[0] == scales[2]
    assert len({scale for step in scales for scale in step}) == 2 * 3 * len(stacks)
    assert all(1 <= scale < 2 for step in scales for scale in step)


def test_a_model_learns_in_float8_where_it_can_and_says_where_not() -> None:
    ids = torch.arange(66).view(2, 33)
    model = adapted(tiny_llama(intermediate_size=72), target_modules=["q_proj", "gate_proj"])
    wanted = gradients(model, ids)
    applied = fused(model, kinds=(*KINDS, FLOAT8))
    assert applied.fused[FLOAT8] == 2 * 4
    assert applied.plain == {f"{FLOAT8}: float8 is for rows and columns that are multiples of 16": 2 * 3}
    found = gradients(model, ids)
    assert largest_error({"logits": found.pop("logits")}, {"logits": wanted.pop("logits")}) < 1e-5, (
        "no MLP is in float8"
    )
    assert 1e-4 < largest_error(found, wanted) < 0.1


def test_gate_and_up_are_in_float8_both_ways() -> None:
    ids = torch.arange(66).view(2, 33)
    model = adapted(tiny_llama())
    wanted = gradients(model, ids)["logits"]
    applied = fused(model, kinds=(*KINDS, FLOAT8))
    assert applied.fused[FLOAT8] == 2 * 7
    assert 1e-4 < largest_error({"logits": gradients(model, ids)["logits"]}, {"logits": wanted}) < 0.1


def test_what_is_wrong_in_float8_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(66).view(2, 33)
    model = adapted(tiny_llama())
    wanted = gradients(model, ids)
    monkeypatch.setattr(
        "qft.kernels.float8.multiply", lambda rows, w, dtype: w.new_ones(len(rows.numbers), len(w), dtype=dtype)
    )
    applied = fused(model, kinds=(*KINDS, FLOAT8))
    assert FLOAT8 not in applied.fused
    [told] = applied.plain
    assert told.startswith(f"{FLOAT8}: they differ")
    assert largest_error(gradients(model, ids), wanted) < 1e-5


class Cut(View):
    def step(self, step: Step) -> None:
        if step.step == 3:
            raise KeyboardInterrupt


def test_a_resumed_training_rounds_as_the_unbroken_one(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for reason in ("_nowhere", "_no_float8"):
        monkeypatch.setattr(f"qft.plan.kernels.{reason}", lambda model: None)
    scales: list[float] = []

    def noted(weights: Any, out: torch.Tensor, scale: float, *, turned: bool) -> None:
        write(weights, out, scale, turned=turned)
        if not (turned or isinstance(out, FakeTensor)):
            scales.append(scale)

    monkeypatch.setattr("qft.kernels.float8.write", noted)
    steps = HARD | {
        "bf16": True,
        "matmul": "fp8",
        "report_to": [],
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    paths = [
        recipe_file(f"{name}.yaml", quant={"preset": "finetune"}, train=steps, output_dir=str(tmp_path / name))
        for name in ("whole", "part")
    ]
    whole = train(load(paths[0]), View())
    assert whole.kernels is not None
    assert whole.kernels.fused[FLOAT8] == 14
    rounded = scales[-4 * 2 :]
    assert len({tuple(rounded[i : i + 2]) for i in range(0, 4 * 2, 2)}) == 4, "otherwise in each step"
    with pytest.raises(KeyboardInterrupt):
        train(load(paths[1]), Cut())
    resumed = train(load(paths[1]), View(), resume=True)
    assert resumed.resumed_from == [2]
    assert scales[-2 * 2 :] == rounded[-2 * 2 :]
    assert resumed.loss == whole.loss
