"""Formats that are trained for: rounded weights are, bit for bit, those of the files that the exports' engines write,
and gradients those of float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import gguf
import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from safetensors import safe_open
from torch import nn
from torch.nn import functional

from qft.quant.dequantize import dequantized_weight
from qft.quant.engines import Block, find_engine, linear_of
from qft.quant.hold import Qat
from qft.quant.rounding import TARGETS, Target, ggml, straight_through
from qft.quant.rounding.integer import Integer, dynamic_int8, static_int8
from qft.quant.rounding.q4_k import q4_k
from qft.recipe.training import QuantSection

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENGINES = {"compressed-tensors": "rtn", "torchao": "torchao", "bnb-4bit": "bitsandbytes"}


def stored(target: Target, weight: torch.Tensor) -> torch.Tensor:
    """The weight after it was written and read again, by the libraries that the exports use."""
    if target.layer is None:
        kind = gguf.GGMLQuantizationType[target.form.removeprefix("gguf-").upper()]
        own = kind == gguf.GGMLQuantizationType.Q4_K
        encoded = q4_k(weight.float()).packed() if own else gguf.quants.quantize(weight.float().numpy(), kind)
        return torch.from_numpy(gguf.quants.dequantize(encoded, kind))
    engine = find_engine(ENGINES[target.form])
    one = nn.ModuleDict({"layer": linear_of(weight)})
    block = Block("", one, {"layer": target.layer}, largest_inputs={"layer": 1.0}, scales={})
    tensors = engine.quantize(block)["layer"].tensors
    return dequantized_weight(engine.restore(linear_of(weight), tensors, target.layer))


def weights(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Of all sizes that a dtype holds, with rows of zeros, blocks of one number, and extremes of both signs."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((1, 128), (3, 256), (17, 512), (64, 768)):
        weight = torch.randn(rows, columns, generator=generator)
        yield weight.to(dtype)
        yield (weight * weight.abs() ** 3).to(dtype)
        size = torch.logspace(-9, 3, rows)[:, None]
        yield (weight * size).to(dtype)
        weight[0], weight[-1, :128] = 0.0, -0.25
        weight[-1, -128:] = torch.tensor([1.0, -1.0]).repeat(64)
        yield weight.to(dtype)
    for rows, columns in ((5, 96), (3, 48), (7, 33), (1, 1)):  # of other blocks than 128, and of none
        yield torch.randn(rows, columns, generator=generator).to(dtype)
    steps = torch.arange(-128, 128).repeat(2, 1) / 8  # halves of a step: ties
    yield steps.to(dtype)
    yield torch.full((2, 256), torch.finfo(dtype).tiny).to(dtype)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # gguf's, of blocks next to zero
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TARGETS)
def test_a_rounded_weight_is_that_of_the_file(name: str, dtype: torch.dtype) -> None:
    for weight in weights(dtype):
        if weight.shape[-1] % TARGETS[name].block:
            continue
        values = TARGETS[name].rounding(weight).values
        expected = stored(TARGETS[name], weight)
        assert values.shape == weight.shape
        assert values.dtype == (torch.float32 if TARGETS[name].layer is None else dtype)
        assert torch.isfinite(values).all()
        assert torch.equal(values, expected), f"{weight.shape}: {(values - expected).abs().max()}"


@pytest.mark.real
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("name", TARGETS)
def test_real_weights_are_those_of_the_file(name: str, package_folder: Path) -> None:
    with safe_open(package_folder / "model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if ".layers.0." in name and name.endswith("proj.weight")]  # noqa: SIM118
        block = [file.get_tensor(name) for name in names]
    assert len(block) == 7
    for weight in block:
        if weight.shape[-1] % TARGETS[name].block == 0:  # 576 is no multiple of 128
            for each in (weight, weight.bfloat16()):
                assert torch.equal(TARGETS[name].rounding(each).values, stored(TARGETS[name], each))


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", TARGETS)
def test_what_is_not_finite_stays_so(name: str, number: float) -> None:
    """So the loss is not, and the run stops at the step that made it."""
    weight = torch.randn(2, 256)
    weight[1, 3] = number
    values = TARGETS[name].rounding(weight).values
    assert not torch.isfinite(values[1]).all()
    if TARGETS[name].block > 1 and not TARGETS[name].shares:
        assert torch.isfinite(values[0]).all()


@pytest.mark.parametrize("shape", [(7, 64), (2, 3, 96)], ids=str)
def test_a_large_weight_is_rounded_in_parts(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(shape, dtype=torch.float64).bfloat16()
    whole = TARGETS["q8_0"].rounding(weight).values
    monkeypatch.setattr(ggml, "AT_ONCE", 200)
    assert torch.equal(TARGETS["q8_0"].rounding(weight).values, whole)


def test_blocks_of_256_hold_what_they_can() -> None:
    """Of a known block: parts that are all negative, all positive, of one number, and zero."""
    weight = torch.zeros(1, 256)
    weight[0, :32], weight[0, 32:64] = torch.linspace(-3.15, -0.63, 32), torch.linspace(0.63, 3.15, 32)
    weight[0, 64:96], weight[0, 96:128] = -0.63, 0.63
    made = q4_k(weight)
    assert made.scales.flatten().tolist() == [50, 63, 0, 13, 0, 0, 0, 0]  # 2.52, 3.15 and 0.63 by a fifteenth
    assert made.minima.flatten().tolist() == [63, 0, 13, 0, 0, 0, 0, 0]
    assert (made.values() - weight).abs().max() < 3.15 / 15 / 2 + 3.15 / 63
    assert made.values()[0, 128:].eq(0).all()


def test_a_scale_beyond_float16_is_not_hidden() -> None:
    assert not torch.isfinite(TARGETS["q4_0"].rounding(torch.full((1, 32), 1e6)).values).all()
    assert not torch.isfinite(TARGETS["q8_0"].rounding(torch.full((1, 32), 1e7)).values).all()


def test_the_recipe_names_them_all() -> None:
    assert list(get_args(get_args(QuantSection.model_fields["target"].annotation)[0])) == list(TARGETS)


def test_layers_of_a_module_share_the_scale_of_the_whole_tensor() -> None:
    """As vLLM needs it, which multiplies with q, k and v, and with gate and up, as one."""
    target, torch_weights = TARGETS["nvfp4"], {name: torch.randn(8, 32) for name in ("a.q", "a.k", "b.up")}
    torch_weights["a.k"] *= 50
    assert target.layer is not None
    modules = nn.ModuleDict({"a": nn.ModuleDict(), "b": nn.ModuleDict()})
    for name, weight in torch_weights.items():
        modules.get_submodule(name[0]).add_module(name[2:], linear_of(weight))
    engine = find_engine("rtn")
    held = engine.quantize(Block("", modules, dict.fromkeys(torch_weights, target.layer)))
    scales = {name: layer.tensors["weight_global_scale"].item() for name, layer in held.items()}
    assert scales["a.q"] == scales["a.k"] < scales["b.up"]

    scheme = Qat("qat", "float32", quant_type="nvfp4")
    named = {f"{name}.weight": weight for name, weight in torch_weights.items()}
    roundings = scheme.settled(dict.fromkeys(torch_weights, target.rounding), named)
    for name, weight in torch_weights.items():
        assert torch.equal(roundings[name](weight).values, dequantized_weight(held[name].module)), name
    assert not torch.equal(roundings["a.q"](torch_weights["a.q"]).values, target.rounding(torch_weights["a.q"]).values)


def test_scales_that_float8_can_hardly_hold_clip() -> None:
    """A block whose scale is rounded down to float8's least: what is more than 7 of its steps has no gradient."""
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 16:18] = 1.0, torch.tensor([6.1e-6, 4e-6])
    rounded = TARGETS["nvfp4"].rounding(weight)
    assert rounded.inside is not None
    assert rounded.inside[0, [0, 16, 17]].tolist() == [True, False, True]
    assert rounded.values[0, 16] < 5e-6


INT4 = ("int4-g32", "int4-g64", "int4-g128", "int8-dynamic-act-int4-weight", "8da4w")
GRIDS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int, int]] = {
    # A block's step in float64 by its definition, and the ends of its range.
    **dict.fromkeys(INT4, (lambda block: block.abs().max() / 7.5, -8, 7)),
    **dict.fromkeys(("int8", "w8a8", "w8a8-static"), (lambda block: block.abs().max() / 127.5, -128, 127)),
    "q4_0": (lambda block: block[block.abs().argmax()] / -8, -8, 7),
    "q8_0": (lambda block: block.abs().max() / 127, -127, 127),
    # Their extremes are on the grid, or next to its end.
    **dict.fromkeys(("mxfp4", "nvfp4", "nf4"), (lambda _: torch.tensor(1.0), -9, 9)),
}


@pytest.mark.parametrize("name", GRIDS)
def test_the_gradient_is_that_of_clipping_alone(name: str) -> None:
    """Against float64: one where the nearest step of a block's scale is within the range, else none. Blocks hold their
    positive extreme, their negative one, or both, next to the edges."""
    (step, least, most), width = GRIDS[name], max(TARGETS[name].block, 32)
    torch.manual_seed(0)
    blocks = torch.randn(64, width).clamp(-2, 2)
    blocks[:32, 5], blocks[16:, 9] = 3.0, -3.0
    blocks[:, 11] = torch.linspace(2.75, 3.0, 64)
    weight = blocks.clone().requires_grad_()
    upstream = torch.randn(64, width)
    [gradient] = torch.autograd.grad(straight_through(weight, TARGETS[name].rounding), weight, upstream)

    expected = torch.zeros(64, width, dtype=torch.float64)
    for i, block in enumerate(blocks.double()):
        codes = block / step(block)
        inside = (codes > least - 0.5) & (codes < most + 0.5)
        edge = ((codes - most - 0.5).abs() < 1e-4) | ((codes - least + 0.5).abs() < 1e-4)  # on it float32 decides
        expected[i] = torch.where(edge, gradient[i].double(), inside * upstream[i])
    assert torch.equal(gradient.double(), expected)
    if name in (*INT4, "q4_0"):
        assert (gradient == 0).any()
    assert {*GRIDS, "q4_k"} == set(TARGETS)


def test_the_gradient_of_blocks_of_256_is_that_of_clipping_alone() -> None:
    """Against float64: scales and minima of 6 bits leave out some of the extremes."""
    torch.manual_seed(0)
    weight, upstream = (torch.randn(16, 512) * torch.randn(16, 512).exp()).requires_grad_(), torch.randn(16, 512)
    [gradient] = torch.autograd.grad(straight_through(weight, TARGETS["q4_k"].rounding), weight, upstream)
    made = q4_k(weight.detach())
    step, least = (
        (unit.double()[..., None] * part.double())[..., None]
        for unit, part in ((made.unit, made.scales), (made.unit_of_minima, made.minima))
    )
    codes = ((weight.detach().double().view(16, 2, 8, 32) + least) / step).view(16, 512)
    inside = (codes > -0.5) & (codes < 15.5)
    assert ((codes + 0.5).abs().minimum((codes - 15.5).abs()) > 1e-5).all(), "on an edge, float32 decides"
    assert 0 < int((~inside).sum()) < 800
    assert torch.equal(gradient, inside * upstream)


def test_what_is_opposite_to_the_extreme_is_clipped_in_q4_0() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([-4.0, 3.7, 3.9])
    values, inside = TARGETS["q4_0"].rounding(weight)
    assert values[0, :3].tolist() == [-4.0, 3.5, 3.5]
    assert inside is not None
    assert inside[0, :3].tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 64), (2, 7, 64), (3, 2, 5, 64)], ids=str)
def test_activations_are_rounded_as_the_loaded_model_rounds_them(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scheme = TARGETS["w8a8"].layer
    assert scheme is not None
    block = Block("", nn.ModuleDict({"layer": linear_of(torch.randn(8, 64, dtype=dtype))}), {"layer": scheme})
    module: Any = find_engine("rtn").quantize(block)["layer"].module
    inputs = torch.randn(shape).to(dtype) * 3
    inputs[0, 0] = 0.0
    expected = forward_quantize(module, inputs, "input", module.quantization_scheme.input_activations)
    assert torch.equal(dynamic_int8(inputs).values, expected)


@pytest.mark.parametrize("name", ["int4-g32", "int8", "w8a8"])
def test_learnt_scales_have_the_gradient_of_lsq(name: str) -> None:
    """Against float64, by the paper: quotients inside, beyond both ends, and next to them."""
    rounding = TARGETS[name].rounding
    assert isinstance(rounding, Integer)
    torch.manual_seed(0)
    weight, upstream = torch.randn(8, 128, requires_grad=True), torch.randn(8, 128)
    scale = (rounding.scales(weight.detach()) * torch.empty_like(rounding.scales(weight)).uniform_(0.4, 1.2)).detach()
    scale.requires_grad_()
    values = rounding.learnt(weight, scale)
    assert torch.equal(values, rounding(weight, scale).values)
    found = torch.autograd.grad(values, (weight, scale), upstream)

    least, most = -(2 ** (rounding.bits - 1)), 2 ** (rounding.bits - 1) - 1
    size = rounding.group_size if rounding.group_size > 0 else 128
    groups, step = weight.detach().double().view(8, -1, size), scale.detach().double()[..., None]
    quotients, given = groups / step, upstream.double().view(8, -1, size)
    inside = (quotients > least) & (quotients < most)
    slope = torch.where(inside, quotients.round() - quotients, quotients.clamp(least, most))
    assert 0 < int((~inside).sum()) < inside.numel() / 2
    assert torch.equal(found[0].double().view_as(given), given * inside)
    expected = (given * slope).sum(-1) / (size * most) ** 0.5
    torch.testing.assert_close(found[1].double(), expected, rtol=1e-4, atol=1e-6)


def test_a_scale_that_the_dtype_cannot_hold_is_not_learnt() -> None:
    """The group is zero whatever its scale is, as in the file; the one beside it learns on."""
    weight = torch.cat([torch.full((1, 32), 3e-8), torch.linspace(-1, 1, 32)[None]], -1).half().requires_grad_()
    scale = Integer(4, 32).scales(weight.detach()).requires_grad_()
    values = Integer(4, 32).learnt(weight, scale)
    of_weight, of_scale = torch.autograd.grad(values.square().sum(), (weight, scale))
    assert values[0, :32].count_nonzero() == 0
    assert of_weight[0, :32].count_nonzero() == of_scale[0, 0] == 0
    assert of_weight[0, 32:].count_nonzero() > 16
    assert 0 < of_scale[0, 1].abs() < torch.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_file_holds_the_scales_that_were_learnt(dtype: torch.dtype) -> None:
    for name in ("int4-g32", "w8a8"):
        target, weight = TARGETS[name], torch.randn(6, 128).to(dtype)
        assert isinstance(target.rounding, Integer)
        assert target.layer is not None
        scales = target.rounding.scales(weight) * 0.83
        block = Block(
            "", nn.ModuleDict({"layer": linear_of(weight)}), {"layer": target.layer}, scales={"layer": scales}
        )
        held = find_engine("rtn").quantize(block)["layer"]
        assert torch.equal(held.tensors["weight_scale"].float().flatten(), scales.to(dtype).float().flatten())
        assert torch.equal(target.rounding(weight, scales).values, dequantized_weight(held.module))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_static_activations_are_rounded_as_the_loaded_model_rounds_them(dtype: torch.dtype) -> None:
    scheme = TARGETS["w8a8-static"].layer
    assert scheme is not None
    layer = linear_of(torch.randn(8, 64, dtype=dtype))
    for largest in (2.5, 1e-3, 700.0):
        block = Block("", nn.ModuleDict({"layer": layer}), {"layer": scheme}, largest_inputs={"layer": largest})
        module: Any = find_engine("rtn").quantize(block)["layer"].module
        inputs = (torch.randn(3, 5, 64) * largest / 2).to(dtype)
        expected = forward_quantize(module, inputs, "input", module.quantization_scheme.input_activations)
        assert torch.equal(static_int8(inputs, torch.tensor(largest)).values, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_with_a_zero_point_are_those_of_torchao(dtype: torch.dtype) -> None:
    target = TARGETS["8da4w"]
    assert target.layer is not None
    assert target.inputs is not None
    layer, inputs = linear_of(torch.randn(8, 64, dtype=dtype)), (torch.randn(2, 5, 64) * 3 + 1).to(dtype)
    inputs[0, 0] = 0.0
    block = Block("", nn.ModuleDict({"layer": layer}), {"layer": target.layer}, scales={})
    module = find_engine("torchao").quantize(block)["layer"].module
    weight = target.rounding(layer.weight.data).values
    assert torch.equal(module(inputs), functional.linear(target.inputs(inputs).values, weight))


def test_what_is_beyond_the_range_of_activations_has_no_gradient() -> None:
    inputs = torch.tensor([50.0, -127.5, 127.4, 127.6, -300.0], requires_grad=True)  # in steps
    values = straight_through(inputs, partial(static_int8, largest=torch.tensor(127.5)))
    [gradient] = torch.autograd.grad(values.sum(), inputs)
    assert gradient.tolist() == [1, 1, 1, 0, 0]
    assert torch.equal(static_int8(inputs.detach(), torch.tensor(0.0)).values, inputs)


def test_a_group_is_not_seen_by_its_neighbours() -> None:
    weight = torch.randn(1, 64)
    changed = weight.clone()
    changed[0, 40] = 100.0
    one, other = (Integer(4, 32)(each).values for each in (weight, changed))
    assert torch.equal(one[0, :32], other[0, :32])
    assert not torch.equal(one[0, 32:], other[0, 32:])
