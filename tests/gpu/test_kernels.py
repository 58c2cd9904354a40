"""The kernels on a GPU: held to the error, to float32, of the model's own code in 16 bits."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from qft.commands.train import train
from qft.documents.plan import Kept
from qft.kernels import keep
from qft.kernels.activation import REFERENCES
from qft.kernels.buffers import SCRATCH, with_border
from qft.kernels.check import Choices
from qft.kernels.dequantize import alike, dequantize_into
from qft.kernels.layer import Layer, Stack, layer_of
from qft.kernels.mlp import Mlp
from qft.kernels.norm import normed, rms_norm
from qft.kernels.project import project
from qft.kernels.rotary import rotary
from qft.memory.checkpointing import enable_checkpointing
from qft.memory.stash import Stash
from qft.progress import View
from qft.recipe import load
from tests.support.architectures import MODELS
from tests.support.kernels import adapted, blocks_of, fused, gradients, total_error
from tests.support.models import tiny_llama
from tests.support.runs import HARD

pytestmark = [
    pytest.mark.gpu,
    # In the thread of the backward pass, where it is the first to ask for the device.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]

BF16, SHARE = torch.bfloat16, 1.2
"""What an error may be of the plain path's."""
Weights = dict[str, Any]
HELD: dict[str, Weights] = {
    "nf4": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4", "compress_statistics": True},
    "nf4-single": {"quant_type": "nf4", "compress_statistics": False},
    "bf16": {},
}


@pytest.fixture(autouse=True)
def shared_memory_is_dirty() -> Iterator[None]:
    yield
    for place in SCRATCH._places.values():
        place.fill_(torch.nan)


def linear(rows: int, columns: int, held: Weights, bias: bool) -> nn.Module:
    made: Any = nn.Linear(columns, rows, bias=bias).to("cuda", BF16)
    if held:
        quantized = bnb.nn.Linear4bit(columns, rows, bias=bias, compute_dtype=BF16, **held)
        quantized.weight = bnb.nn.Params4bit(made.weight.data.cpu(), requires_grad=False, **held)
        quantized.bias, made = made.bias, quantized
    return made.requires_grad_(False).cuda()


def layers(*shapes: tuple[int, int], held: str = "nf4", bias: bool = False, r: int = 16) -> list[Layer]:
    torch.manual_seed(0)
    inner = nn.ModuleList(linear(*shape, HELD[held], bias) for shape in shapes)
    inner.is_loaded_in_4bit = bool(HELD[held])  # type: ignore[assignment]
    model = adapted(inner, None, target_modules=[str(i) for i in range(len(shapes))], r=r).cuda()
    made = [layer_of(module) for module in model.base_model.model]
    assert all(isinstance(each, Layer) for each in made), made
    return made  # type: ignore[return-value]


def exact(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """In float32 throughout."""
    weight, state = layer.held
    if state is not None:
        weight = bnb.functional.dequantize_4bit(weight.data, state)
    out = nn.functional.linear(x, weight.float(), None if layer.bias is None else layer.bias.float())
    a, b = layer.pair
    assert a is not None
    assert b is not None
    return out + layer.scaling * (x @ a.t()) @ b.t()


def compared(
    run: Callable[[torch.Tensor], torch.Tensor],
    plain: Callable[[torch.Tensor], torch.Tensor],
    wanted: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    trained: list[torch.Tensor],
) -> None:
    """Output and gradients of `run` are as close to `wanted`, in float32, as those of `plain`."""
    results = []
    for function, given, mixed in ((wanted, x.float(), False), (plain, x, True), (run, x, True)):
        given = given.detach().clone().requires_grad_()
        with torch.autocast("cuda", dtype=BF16, enabled=mixed):
            out = function(given)
        seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        found = torch.autograd.grad(out, [given, *trained], seed)
        assert mixed is False or (out.dtype, found[0].dtype) == (BF16, BF16)
        results.append([tensor.float() for tensor in (out, *found)])
    for exactly, other, found in zip(*results, strict=True):
        bound = SHARE * (other - exactly).norm() + 1e-6 * exactly.norm()
        assert (found - exactly).norm() <= bound, ((found - exactly).norm() / exactly.norm(), bound / exactly.norm())


def pairs(*given: Layer) -> list[torch.Tensor]:
    return [tensor for layer in given for tensor in layer.pair if tensor is not None]


@pytest.mark.parametrize("rows", [1, 77, 1024])
@pytest.mark.parametrize(("held", "bias"), [("nf4", False), ("fp4", True), ("nf4-single", True), ("bf16", False)])
def test_products(held: str, bias: bool, rows: int) -> None:
    three = layers((512, 256), (128, 256), (192, 256), held=held, bias=bias)
    stack, x = Stack(three), torch.randn(1, rows, 256, device="cuda", dtype=BF16)
    for place in SCRATCH._places.values():
        place.fill_(torch.nan)
    compared(
        lambda x: torch.cat(project(x, stack), -1),
        lambda x: torch.cat([each.module(x) for each in three], -1),
        lambda x: torch.cat([exact(each, x) for each in three], -1),
        x,
        pairs(*three),
    )


@pytest.mark.parametrize("r", [64, 100, 160])
def test_adapters_of_any_rank(r: int) -> None:
    three = layers((512, 256), (128, 256), (192, 256), bias=True, r=r)
    stack, x = Stack(three), torch.randn(1, 77, 256, device="cuda", dtype=BF16)
    compared(
        lambda x: torch.cat(project(x, stack), -1),
        lambda x: torch.cat([each.module(x) for each in three], -1),
        lambda x: torch.cat([exact(each, x) for each in three], -1),
        x,
        pairs(*three),
    )


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("rows", [1, 333])
def test_mlps(kind: str, rows: int) -> None:
    act = REFERENCES[kind]
    gate, up, down = layers((576, 256), (576, 256), (256, 576), bias=True)
    mlp = Mlp(Stack([gate, up]), Stack([down]), kind)
    x = torch.randn(2, rows, 256, device="cuda", dtype=BF16)
    compared(
        mlp,
        lambda x: down.module(act(gate.module(x)) * up.module(x)),
        lambda x: exact(down, act(exact(gate, x)) * exact(up, x)),
        x,
        pairs(gate, up, down),
    )


def test_gate_and_up_that_are_gone_are_not_read_again() -> None:
    gate, up, down = layers((576, 256), (576, 256), (256, 576))
    mlp = Mlp(Stack([gate, up]), Stack([down]), "silu")
    out = mlp(torch.randn(5, 256, device="cuda", dtype=BF16, requires_grad=True))
    out.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="no second backward pass"):
        out.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("shape", [(1, 1, 4096), (2, 33, 576), (2, 5, 4, 128), (3000, 64)])
@pytest.mark.parametrize(("shift", "border"), [(0.0, 64), (1.0, 0)])
def test_norms(shape: tuple[int, ...], shift: float, border: int) -> None:
    w = nn.Parameter(torch.randn(shape[-1], device="cuda", dtype=BF16))
    x = torch.randn(shape, device="cuda", dtype=BF16)

    def plain(x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        even = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return ((shift + w.float()) * even).to(x.dtype) if shift else w * even.to(x.dtype)

    def run(x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, w, 1e-5, shift, BF16, border)

    compared(run, plain, lambda x: nn.functional.rms_norm(x, shape[-1:], w.float() + shift, 1e-5), x, [w])


@pytest.mark.parametrize("tokens", [1, 33])
def test_rotary_positions(tokens: int) -> None:
    cos, sin = (torch.randn(2, tokens, 64, device="cuda", dtype=BF16) for _ in range(2))

    def turned(x: torch.Tensor, angle: torch.dtype) -> torch.Tensor:
        x1, x2 = x.chunk(2, -1)
        c, s = cos.to(angle).unsqueeze(1), sin.to(angle).unsqueeze(1)
        return x * c + torch.cat([-x2, x1], -1) * s

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(2, tokens, -1, 64).transpose(1, 2)

    def run(x: torch.Tensor) -> torch.Tensor:
        q, k = heads(x[..., : 10 * 64]), heads(x[..., 10 * 64 :])
        return torch.cat(rotary(q, k, cos, sin), 1)

    x = torch.randn(2, tokens, 13 * 64, device="cuda", dtype=BF16)
    compared(run, lambda x: turned(heads(x), BF16), lambda x: turned(heads(x), torch.float32), x, [])


@pytest.mark.parametrize(("rows", "columns"), [((7,), 64), ((33, 5), 1152), ((5, 2, 19), 4096), ((3, 64, 1, 8), 192)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("border", [64, 1])
def test_dequantized_weights_are_bitsandbytes_to_the_bit(
    rows: tuple[int, ...], columns: int, kind: str, nested: bool, border: int
) -> None:
    weights = [
        bnb.functional.quantize_4bit(
            torch.randn(count, columns, device="cuda", dtype=BF16) * size, quant_type=kind, compress_statistics=nested
        )
        for size, count in enumerate(rows, 1)
    ]
    assert alike(weights)
    out = torch.full((sum(rows), columns + border), torch.nan, device="cuda", dtype=BF16)
    dequantize_into(weights, out[:, :columns])
    assert torch.equal(out[:, :columns], torch.cat([bnb.functional.dequantize_4bit(*held) for held in weights]))
    assert out[:, columns:].isnan().all()


def test_a_kernel_is_compiled_for_what_it_is_given() -> None:
    """Addresses and strides that are multiples of 16 and others, one after the other, and back."""
    x, w = torch.randn(5, 200, device="cuda", dtype=BF16), torch.randn(200, device="cuda", dtype=BF16)
    for first, last in ((0, 192), (1, 193), (0, 200), (3, 4), (0, 192)):
        given, weight = x[:, first:last], w[first:last]
        found, _ = normed(given, weight, 1e-5, 0.0, BF16, 0)
        wide = given.float()
        wanted = (wide * (wide.square().mean(1, keepdim=True) + 1e-5).rsqrt() * weight.float()).to(BF16)
        torch.testing.assert_close(found, wanted)


def test_who_watches_launches_is_told_of_each() -> None:
    x, w = torch.randn(4, 64, device="cuda", dtype=BF16), torch.ones(64, device="cuda", dtype=BF16)
    told: list[Any] = []
    hook = importlib.import_module("triton.knobs").runtime.launch_enter_hook
    for watched in (False, True, False):
        if watched:
            hook.add(told.append)
        for _ in range(2):
            normed(x, w, 1e-5, 0.0, BF16, 0)
        assert len(told) == 2 * watched
        if watched:
            hook.remove(told.append)
            told.clear()


def held_in_4_bits(model: Any) -> Any:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name and "embed_out" not in name:
            made: Any = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=BF16
            )
            made.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            made.bias = module.bias
            model.set_submodule(name, made)
    model.is_loaded_in_4bit = True
    return model.to(BF16).cuda()


def in_float32(model: Any) -> Any:
    """The same model and adapters, all of it in float32."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(base := getattr(module, "base_layer", None), bnb.nn.Linear4bit):
            exactly = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
            exactly.weight.data = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
            exactly.bias, module.base_layer = base.bias, exactly.requires_grad_(False)
    return twin.float().cuda()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "phi", "mixtral"])
def test_models_are_as_exact_fused_as_they_are_plain(kind: str, checkpointed: bool) -> None:
    model = held_in_4_bits(MODELS[kind]())
    if checkpointed:
        enable_checkpointing(model)
        model.enable_input_require_grads()
    model = adapted(model, None).cuda()
    ids = torch.arange(66, device="cuda").view(2, 33)
    choices = [Choices(), Choices()]  # of experts: a token that goes to others tells nothing of how exact kernels are

    def of(model: Any, mixed: torch.dtype | None) -> dict[str, torch.Tensor]:
        with ExitStack() as entered:
            for each, block in zip(choices, blocks_of(model), strict=True):
                entered.enter_context(each.of(block))
            return gradients(model, ids, mixed)

    exactly, plain = of(in_float32(model), None), of(model, BF16)
    applied = fused(model, BF16)
    assert applied.fused["linear layers"] >= 8, applied.plain
    found = of(model, BF16)
    assert found.keys() == plain.keys() == exactly.keys()
    errors = [total_error(own, exactly) for own in (found, plain)]
    assert errors[0] <= SHARE * errors[1]


def test_checkpointed_is_not_checkpointed_to_the_bit() -> None:
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = held_in_4_bits(tiny_llama())
        if checkpointed:
            enable_checkpointing(model)
            model.enable_input_require_grads()
        model = adapted(model, None).cuda()
        assert fused(model, BF16).fused["MLPs"] == 2
        found.append(gradients(model, torch.arange(66, device="cuda").view(2, 33), BF16))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("kept", ["attention", "products"])
def test_what_is_made_again_is_what_was_kept_to_the_bit(kept: Kept) -> None:
    torch.manual_seed(0)
    model = adapted(held_in_4_bits(tiny_llama()), None).cuda()
    ids = torch.arange(2 * 1024, device="cuda").view(2, 1024) % 100
    applied = fused(model, BF16)
    wanted = {name: value.clone() for name, value in gradients(model, ids, BF16).items()}
    for stash in (None, Stash(torch.device("cuda"))):
        keep(applied.keeps, [kept] * 2, stash)
        found = gradients(model, ids, BF16)
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_bordered_norm_is_read_where_it_is() -> None:
    x = torch.randn(9, 256, device="cuda", dtype=BF16, requires_grad=True)
    w = torch.ones(256, device="cuda", dtype=BF16)
    y = rms_norm(x, w, 1e-5, 0.0, BF16, 64)
    assert with_border(y, 64) is not None
    three = layers((512, 256), (128, 256), (192, 256))
    stack = Stack(three)
    assert stack.border == 64
    outs = project(y, stack)
    assert torch.equal(torch.cat(outs, 1), torch.cat(project(y.detach().clone(), stack), 1))


def test_a_training_says_what_was_fused_and_learns_as_the_plain_one(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    reports = {}
    for kernels in ("fused", "plain"):
        asked: dict[str, Any] = HARD | {"report_to": [], "kernels": kernels, "gradient_checkpointing": True}
        path = recipe_file(model={"device": "cuda"}, train=asked, output_dir=str(tmp_path / kernels))
        reports[kernels] = train(load(path), View())
    fused, plain = reports["fused"], reports["plain"]
    assert plain.kernels is None
    assert fused.kernels is not None
    assert fused.kernels.fused == {"MLPs": 2, "linear layers": 8, "norms": 5, "rotary positions": 2}
    assert fused.kernels.plain == {}
    assert fused.loss.first == pytest.approx(plain.loss.first, rel=1e-3)
    assert fused.loss.last == pytest.approx(plain.loss.last, rel=0.02)
