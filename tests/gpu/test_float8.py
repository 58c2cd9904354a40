"""Products in float8 on a GPU: kernels to the bit of their references, and products and gradients close to 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from qft.commands.train import train
from qft.errors import ModelError
from qft.kernels import FLOAT8
from qft.kernels.activation import activate, activate_back
from qft.kernels.buffers import SCRATCH
from qft.kernels.dequantize import dequantized
from qft.kernels.float8 import E4M3, Added, Factor, largest, power_for, taken, write
from qft.kernels.layer import Layer, Stack, layer_of
from qft.kernels.project import project, project_joint
from qft.kernels.rounding import Rounded, rounded, rounded_beside
from qft.progress import View
from qft.recipe import load
from tests.support.architectures import MODELS
from tests.support.gguf import saved
from tests.support.kernels import KINDS, adapted, fused, gradients
from tests.support.models import tiny_llama
from tests.support.runs import HARD

BF16 = torch.bfloat16
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="float8 needs Hopper"
    ),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("shape", [(1, 16), (77, 576), (33, 14336)])
def test_rows_are_those_of_the_reference(shape: tuple[int, int], known: bool) -> None:
    x = torch.randn(shape[0], shape[1] + 64, device="cuda", dtype=BF16)[:, : shape[1]] * 1e-3
    x[-1] = 0
    x[0, 3] = 1e4

    def made(x: torch.Tensor) -> Rounded:
        return rounded(x, Factor(0.37, 1.25), x.float().abs().amax(1).view(torch.int32) if known else None)

    found, wanted = made(x), made(x.cpu())
    assert torch.equal(found.scales.cpu(), wanted.scales)
    back, exactly = (own.numbers.float().cpu() * own.scales.cpu() for own in (found, wanted))
    assert float((back != exactly).float().mean()) < 1e-3, "ties, where one divides and the other multiplies"
    torch.testing.assert_close(back, exactly, rtol=2**-3, atol=0)
    x[0, 5] = torch.inf
    assert made(x).scales[0].isnan().all()


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize(
    ("rows", "columns", "rank", "half"), [(1, 16, 1, 0), (77, 576, 33, 0), (77, 576, 24, 12), (130, 14336, 32, 16)]
)
def test_what_is_lacking_is_added_by_the_activation(kind: str, rows: int, columns: int, rank: int, half: int) -> None:
    both = torch.randn(rows, 2 * columns + 64, device="cuda", dtype=BF16)[:, : 2 * columns]
    g, x = (torch.randn(rows, n, device="cuda", dtype=BF16) for n in (columns, 64))
    x[:, rank:] = 0
    right, below = torch.randn(2 * columns, 64, device="cuda", dtype=BF16) * 0.1, x.new_empty(64, columns).normal_()
    if half:
        right[:columns, half:], right[columns:, :half] = 0, 0
    lacking, pending = Added(x, right.t(), rank, half), Added(x, below, rank)
    before, whole, dh = both.clone(), lacking.to(both.clone()), pending.to(g.clone())

    def off(own: torch.Tensor, other: torch.Tensor) -> float:
        return float((own.float() - other.float()).norm() / other.float().norm())

    assert off(activate(both, kind, 64, lacking), activate(whole, kind, 64)) < 2e-3
    assert torch.equal(both, before)
    wanted = activate_back(whole.clone(), dh.clone(), kind)
    for given, gradient, *added in ((both, g, lacking, pending), (both, dh, lacking, None), (whole, g, None, pending)):
        found = activate_back(given.clone(), gradient.clone(), kind, *added)
        assert max(off(own, other) for own, other in zip(found[:2], wanted[:2], strict=True)) < 2e-3
        assert found[2] is not None
        assert torch.equal(found[2].view(torch.float32), found[0].float().abs().amax(1))


@pytest.mark.parametrize(("counts", "width"), [((48,), 64), ((208,), 1152), ((144, 16, 112), 4096), ((16, 304), 192)])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "bf16"])
@pytest.mark.parametrize("nested", [False, True])
def test_weights_are_those_of_the_reference(counts: tuple[int, ...], width: int, kind: str, nested: bool) -> None:
    weights: Any = [(torch.randn(count, width, device="cuda", dtype=BF16), None) for count in counts]
    if kind == "bf16":
        weights = weights[:1]
    else:
        weights = [
            bnb.functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested) for weight, _ in weights
        ]
    scale = max(float(power_for(largest(*held))) for held in weights)
    exactly = weights[0][0] if kind == "bf16" else dequantized(weights, width)
    wanted = (exactly.float() / scale).to(E4M3).float()
    for turned in (False, True):
        rows, columns = exactly.shape[::-1] if turned else exactly.shape
        whole = torch.zeros(rows, columns + (32 if turned else 0), device="cuda", dtype=E4M3)
        write(weights, whole[:, :columns], scale, turned=turned)
        found = whole[:, :columns].float()
        assert torch.equal(found.t() if turned else found, wanted)
        assert not whole[:, columns:].float().any()


@pytest.mark.parametrize(("rows", "columns", "rank"), [(1, 48, 1), (77, 2064, 33), (130, 28672, 32), (64, 4096, 64)])
def test_rows_are_rounded_and_multiplied_in_one_pass(rows: int, columns: int, rank: int) -> None:
    x, right = (
        torch.randn(rows, columns, device="cuda", dtype=BF16),
        torch.randn(columns, 64, device="cuda", dtype=BF16),
    )
    right[:, rank:] = 0
    most = x.float().abs().amax(1).view(torch.int32)
    border, narrow = x.new_full((rows, 128), torch.nan), right[:, : taken(rank)]
    found, wanted = rounded_beside(x, Factor(2.0, 1.3), most, narrow, border), rounded(x, Factor(2.0, 1.3))
    assert torch.equal(found.numbers.view(torch.uint8), wanted.numbers.view(torch.uint8))
    assert torch.equal(found.scales, wanted.scales)
    torch.testing.assert_close(border[:, :rank], (x.float() @ right[:, :rank].float()).to(BF16), rtol=2**-6, atol=0.05)
    assert not border[:, rank:].any()


def layers(*shapes: tuple[int, int], bias: bool, rank: int = 16) -> list[Layer]:
    torch.manual_seed(0)
    inner: Any = nn.ModuleList()
    for rows, columns in shapes:
        made = bnb.nn.Linear4bit(columns, rows, bias=bias, compute_dtype=BF16, quant_type="nf4")
        made.weight = bnb.nn.Params4bit(torch.randn(rows, columns) * 0.05, requires_grad=False, quant_type="nf4")
        inner.append(made.requires_grad_(False).cuda())
    inner.is_loaded_in_4bit = True
    model = adapted(inner, None, target_modules=[str(i) for i in range(len(shapes))], r=rank).cuda()
    return [layer_of(module) for module in model.base_model.model]  # type: ignore[misc]


@pytest.mark.parametrize(("rows", "rank"), [(1, 16), (77, 16), (1024, 16), (77, 64), (77, 170)])
@pytest.mark.parametrize("shapes", [[(512, 256), (128, 256), (192, 256)], [(576, 1536)], [(1536, 576), (1536, 576)]])
@pytest.mark.parametrize("joint", [False, True])
def test_products_are_those_of_16_bits_but_for_four_bits_of_each_number(
    shapes: list[tuple[int, int]], rows: int, rank: int, joint: bool
) -> None:
    stack = Stack(layers(*shapes, bias=True, rank=rank))
    x = torch.randn(1, rows, shapes[0][1], device="cuda", dtype=BF16)
    results, pairs = [], [tensor for tensor in stack.pairs if tensor is not None]
    for float8 in (False, True):
        stack.float8 = stack.both_ways = float8
        given = x.clone().requires_grad_()
        with torch.autocast("cuda", dtype=BF16):
            out = project_joint(given, stack) if joint else torch.cat(project(given, stack), -1)
        g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        results.append([out.detach(), *torch.autograd.grad(out, [given, *pairs], g)])
        for place in SCRATCH._places.values():
            place.fill_(torch.nan)
    errors = [float((a.float() - b.float()).norm() / b.float().norm()) for b, a in zip(*results, strict=True)]
    assert all(0.01 < error < 0.06 for error in errors[not joint : 2]), errors
    assert all(error < 0.01 for error in errors[2:]), errors  # what is trained is multiplied in 16 bits


@pytest.mark.parametrize(("kind", "products"), [("llama", 14), ("gpt_neox", 8), ("phi", 12)])
def test_models_learn_in_float8(kind: str, products: int) -> None:
    model: Any = MODELS[kind]()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name and "embed_out" not in name:
            made: Any = bnb.nn.Linear4bit(module.in_features, module.out_features, module.bias is not None, BF16)
            made.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            made.bias = module.bias
            model.set_submodule(name, made)
    model.is_loaded_in_4bit = True
    model = adapted(model.to(BF16).cuda(), None).cuda()
    ids = torch.arange(66, device="cuda").view(2, 33)
    wanted = gradients(model, ids, BF16)
    applied = fused(model, BF16, (*KINDS, FLOAT8))
    assert applied.fused[FLOAT8] == products, applied.plain
    found = gradients(model, ids, BF16)
    assert found.keys() == wanted.keys()
    wrong = sum(float((found[n].double() - wanted[n].double()).square().sum()) for n in wanted)
    assert 1e-3 < (wrong / sum(float(wanted[n].double().square().sum()) for n in wanted)) ** 0.5 < 0.2


def test_a_training_in_float8_says_so_and_one_of_odd_sizes_is_refused(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    asked: dict[str, Any] = HARD | {"report_to": [], "matmul": "fp8"}
    path = recipe_file(model={"device": "cuda"}, train=asked)
    report = train(load(path), View())
    assert report.kernels is not None
    assert report.kernels.fused == {
        "MLPs": 2, "linear layers": 8, "norms": 5, "rotary positions": 2, "products in float8": 14,
    }  # fmt: skip
    assert report.loss.last < report.loss.first
    assert report.memory.predicted_peak_bytes
    odd = saved(tiny_llama(hidden_size=40, num_attention_heads=4, intermediate_size=72), tmp_path / "odd")
    path = recipe_file(model={"path": str(odd), "device": "cuda"}, quant=None, train=asked)
    with pytest.raises(ModelError, match=r"no products in float8: .*multiples of 16.*Set train\.matmul to 16bit"):
        train(load(path, ["output_dir=" + str(tmp_path / "odd-run")]), View())
