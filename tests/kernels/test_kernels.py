"""The kernels' references: their gradients in float64, and whole models computed by them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from qft.kernels.activation import REFERENCES
from qft.kernels.buffers import SCRATCH, bordered_empty, with_border
from qft.kernels.check import Choices
from qft.kernels.dequantize import alike, dequantized
from qft.kernels.jit import _specialized
from qft.kernels.layer import Layer, Stack, layer_of
from qft.kernels.mlp import Down, Mlp
from qft.kernels.norm import Norm, rms_norm
from qft.kernels.project import project
from qft.kernels.rotary import Rotate, rotary
from qft.memory.checkpointing import enable_checkpointing
from tests.support.architectures import MODELS
from tests.support.families import tiny
from tests.support.kernels import adapted, fused, gradients, largest_error
from tests.support.models import tiny_llama

DOUBLE = torch.float64
IDS = torch.arange(66).view(2, 33)


def layers(*shapes: tuple[int, int], ranks: tuple[int, ...], bias: bool) -> list[Layer]:
    """Of these (rows, columns); rank 0: without an adapter. What is not A and B is frozen."""
    torch.manual_seed(0)
    inner = nn.ModuleList(nn.Linear(columns, rows, bias=bias and i != 1) for i, (rows, columns) in enumerate(shapes))
    model = adapted(inner, target_modules=[str(i) for i, r in enumerate(ranks) if r], r=3)
    made = [layer_of(module) for module in model.base_model.model]
    for module in inner:
        module.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    made = [layer_of(module) for module in model.base_model.model]
    assert all(isinstance(each, Layer) for each in made)
    return made  # type: ignore[return-value]


def filled_with_nan() -> None:
    """Whatever the shared memory held before."""
    for place in SCRATCH._places.values():
        place.fill_(torch.nan)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
def test_products_and_all_their_gradients(bias: bool, rows: int) -> None:
    stack = Stack(layers((6, 8), (3, 8), (5, 8), ranks=(3, 0, 3), bias=bias))
    x = torch.randn(1, rows, 8, dtype=DOUBLE, requires_grad=True)
    wanted = [each.module(x) for each in stack.layers]
    filled_with_nan()
    for found, other in zip(project(x, stack), wanted, strict=True):
        torch.testing.assert_close(found, other)
    pairs = [tensor for tensor in stack.pairs if tensor is not None]
    assert torch.autograd.gradcheck(lambda x, *_: project(x, stack), (x, *pairs))


@pytest.mark.parametrize("kind", REFERENCES)
def test_mlps_and_all_their_gradients(kind: str) -> None:
    gate, up, down = layers((6, 8), (6, 8), (8, 6), ranks=(3, 3, 3), bias=True)
    mlp = Mlp(Stack([gate, up]), Stack([down]), kind)
    x = torch.randn(3, 8, dtype=DOUBLE, requires_grad=True)
    wanted = down.module(REFERENCES[kind](gate.module(x)) * up.module(x))
    torch.testing.assert_close(mlp(x), wanted, rtol=1e-6, atol=1e-6)
    pairs = [tensor for stack in (mlp.first, mlp.down) for tensor in stack.pairs if tensor is not None]
    assert torch.autograd.gradcheck(lambda x, *_: mlp(x), (x, *pairs))


@pytest.mark.parametrize(("shift", "border"), [(0.0, 0), (1.0, 64)])
def test_norms_and_the_gradient_of_their_weight(shift: float, border: int) -> None:
    x, w = (torch.randn(shape, dtype=DOUBLE, requires_grad=True) for shape in ((2, 3, 7), (7,)))
    found: torch.Tensor = rms_norm(x, w, 1e-3, shift, DOUBLE, border)
    torch.testing.assert_close(found, nn.functional.rms_norm(x, (7,), w + shift, 1e-3))
    turned = rms_norm(x.transpose(0, 1), w, 1e-3, shift, DOUBLE)
    assert torch.equal(turned, found.transpose(0, 1))
    assert turned.stride() == x.transpose(0, 1).stride()
    assert (with_border(found.view(6, 7), 64) is not None) == bool(border)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3, shift, DOUBLE, border), (x, w))


def test_rotary_positions_back_and_forth() -> None:
    q, k = (torch.randn(2, heads, 3, 8, dtype=DOUBLE, requires_grad=True) for heads in (4, 2))
    cos, sin = torch.randn(1, 3, 8, dtype=DOUBLE), torch.randn(1, 3, 8, dtype=DOUBLE)
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, cos, sin), (q, k))


def test_the_border_of_somebody_elses_tensor_is_not_written_to() -> None:
    stack = Stack(layers((6, 8), ranks=(3,), bias=True))
    whole = torch.randn(4, 8 + stack.border, dtype=DOUBLE)
    before = whole.clone()
    torch.autograd.grad(project(whole[:, :8].requires_grad_(), stack)[0].sum(), stack.pairs)  # type: ignore[arg-type]
    assert torch.equal(whole, before)
    assert with_border(bordered_empty((2, 2, 8), 64, whole).view(4, 8), 64) is not None


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_are_what_bitsandbytes_makes_of_them(kind: str, nested: bool) -> None:
    packed, state = bnb.functional.quantize_4bit(torch.randn(6, 320), quant_type=kind, compress_statistics=nested)
    assert torch.equal(dequantized([(packed, state)], 320), bnb.functional.dequantize_4bit(packed, state))


def test_weights_are_read_together_only_if_one_kernel_reads_them() -> None:
    def held(kind: str = "nf4", nested: bool = True, block: int = 64) -> Any:
        weight = torch.randn(8, 128)
        return bnb.functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=block)

    assert alike([held(), held(), held()])
    others: list[Any] = [held(kind="fp4"), held(nested=False), held(block=128), (torch.randn(8, 128), None)]
    assert not any(alike([held(), other]) or alike([other, held()]) for other in others)
    in_words = held()
    assert not alike([held(), (in_words[0].flatten().view(torch.int16), in_words[1])])
    other = held()
    other[1].state2.code = other[1].state2.code * 1.01
    assert not alike([held(), other])


def test_weights_of_bitsandbytes_are_not_asked_by_way_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, calls = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu"), []
    weight, stack = linear.weight, Stack([layer_of(linear)])  # type: ignore[list-item]
    wanted = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    monkeypatch.setattr(bnb.nn.Params4bit, "__torch_function__", classmethod(lambda *args: calls.append(args)))
    made = stack.matrix(torch.device("cpu"), forward=True)
    assert not calls
    assert torch.equal(made.weight[:64, :128], wanted.to(torch.bfloat16))
    assert weight.nbytes is None  # so they would have told
    assert len(calls) == 1


def test_what_triton_compiles_otherwise_is_known_apart() -> None:
    def key(argument: Any) -> Any:
        return tuple(_specialized((argument,))[0])

    x = torch.zeros(64, dtype=torch.bfloat16)
    apart = [x, x[1:], x.float(), 1, 2, 16, 2**31, 2**31 + 1, 1.5, None]
    assert len({key(argument) for argument in apart}) == len(apart)
    for same in ([x, x[8:], torch.ones(3, dtype=x.dtype)], [2, 3, 17, -1], [16, 0, 4096], [1.0, 2.5]):
        assert len({key(argument) for argument in same}) == 1
    assert _specialized((x, 3, 0.5, None))[1] == [x.data_ptr(), 3, 0.5, None]


LLAMA = Counter({"MLPs": 2, "linear layers": 8, "norms": 5, "rotary positions": 2})
FOUND: dict[str, Counter[str]] = {
    "llama": LLAMA,
    "gpt_neox": Counter({"linear layers": 8, "rotary positions": 2}),
    "phi": Counter({"linear layers": 12, "rotary positions": 2}),
    "bloom": Counter({"linear layers": 8}),
    "gpt2": Counter(),
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", FOUND)
def test_a_fused_model_is_the_plain_one(kind: str, checkpointed: bool) -> None:
    model = MODELS[kind]()
    if checkpointed:
        enable_checkpointing(model)
        model.enable_input_require_grads()
    model = adapted(model)
    random = torch.get_rng_state()
    wanted, weights = gradients(model, IDS), {n: p.clone() for n, p in model.named_parameters()}
    torch.set_rng_state(random)
    assert fused(model).fused == FOUND[kind]
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    filled_with_nan()
    assert largest_error(gradients(model, IDS), wanted) < 1e-5


def test_gemmas_norms_add_one_and_its_mlps_are_fused_before_a_norm() -> None:
    model = adapted(tiny("gemma3"), target_modules=["q_proj", "k_proj", "gate_proj", "down_proj"])
    wanted = gradients(model, IDS)
    applied = fused(model)
    assert (applied.fused["MLPs"], applied.fused["norms"]) == (2, 2 * 6 + 1)
    assert largest_error(gradients(model, IDS), wanted) < 1e-5


def test_what_nobody_reads_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    enable_checkpointing(model)
    model.enable_input_require_grads()
    model, calls = adapted(model), Counter[str]()
    fused(model)
    for name, function in (("down", Down), ("norm", Norm)):
        monkeypatch.setattr(function, "forward", counted(function.forward, calls, name))
    gradients(model, IDS)
    assert calls == {"down": 2, "norm": 2 * 2 * 2 + 1}


def counted(forward: Callable[..., Any], calls: Counter[str], name: str) -> Any:
    def count(*args: Any) -> Any:
        calls[name] += 1
        return forward(*args)

    return staticmethod(count)


def test_only_a_training_that_is_as_it_was_found_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = adapted(tiny_llama()), Counter[str]()
    fused(model)
    monkeypatch.setattr(Down, "forward", counted(Down.forward, calls, "fused"))

    def fuses() -> bool:
        before = calls["fused"]
        model(input_ids=IDS, use_cache=False)
        return calls["fused"] > before

    assert fuses()
    model.eval()
    assert not fuses()
    model.train()
    with torch.no_grad():
        assert not fuses()
    with model.disable_adapter():
        assert not fuses()
    model.merge_adapter()
    assert not fuses()
    model.unmerge_adapter()
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    assert not fuses()
    model.set_adapter("default")
    assert fuses()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora_dropout": 0.1}, "its adapter has dropout"),
        ({"use_dora": True}, "its adapter is more than A and B"),
        ({"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]}, "its own weights or bias are trained"),
    ],
)
def test_an_adapter_that_is_more_than_a_and_b_is_plain(changes: dict[str, Any], reason: str) -> None:
    model = adapted(tiny_llama(attention_bias=True, mlp_bias=True), **changes)
    wanted = gradients(model, IDS)
    applied = fused(model)
    assert any(reason in told for told in applied.plain)
    assert largest_error(gradients(model, IDS), wanted) < 1e-5


def swapped(ctx: Any, q: Any, k: Any, cos: Any, sin: Any, stack: Any, real: Any = Rotate.forward) -> Any:
    return real(ctx, q, k, sin, cos, stack)


def broken(*_: Any) -> Any:
    raise RuntimeError("out of registers")


@pytest.mark.parametrize(("wrong", "reason"), [(swapped, "they differ from"), (broken, "out of registers")])
def test_a_part_that_is_not_the_models_own_code_is_taken_back(
    wrong: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(tiny_llama())
    wanted = gradients(model, IDS)
    monkeypatch.setattr(Rotate, "forward", staticmethod(wrong))
    applied = fused(model)
    assert applied.fused == LLAMA - Counter({"rotary positions": 2})
    [told] = applied.plain
    assert told.startswith("rotary positions: ")
    assert reason in told
    assert largest_error(gradients(model, IDS), wanted) < 1e-5


class Dropping(LlamaMLP):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = nn.functional.dropout(super().forward(x), 0.5, self.training)
        return out


def test_an_mlp_that_drops_in_training_is_plain() -> None:
    model = tiny_llama()
    for block in model.model.layers:
        block.mlp.__class__ = Dropping
    applied = fused(adapted(model))
    assert applied.plain == {"MLPs: they change in training what their last product makes": 2}
    assert "MLPs" not in applied.fused


@pytest.mark.parametrize("checkpointed", [False, True])
def test_tokens_near_a_tie_do_not_make_kernels_differ(checkpointed: bool) -> None:
    """Experts that are all alike to the router: the last bit decides."""
    model = MODELS["mixtral"]()
    for block in model.model.layers:
        block.mlp.gate.weight.data.copy_(block.mlp.gate.weight[:1].expand(4, -1))
    if checkpointed:
        enable_checkpointing(model)
        model.enable_input_require_grads()
    applied = fused(adapted(model, torch.float32))
    assert {"linear layers", "norms", "rotary positions"} <= applied.fused.keys(), applied.plain
    assert all("forward" not in vars(block.mlp) for block in model.model.layers)


class Chooses(nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        (values, places), named = x.topk(2), torch.topk(x, k=1, dim=0)
        return [values, places, named.values, named.indices, x.argmax(-1)]


def test_what_is_chosen_by_size_stays_chosen() -> None:
    module, x = nn.Sequential(Chooses()), torch.tensor([[3.0, 2.0, 1.0], [4.0, 6.0, 5.0]])
    with Choices().of(module):
        first = module(x)
        for _ in range(2):
            values, places, top, tops, most = module(-x)
            assert torch.equal(values, -first[0])
            assert torch.equal(top, -first[2])
            assert all(torch.equal(a, b) for a, b in ((places, first[1]), (tops, first[3]), (most, first[4])))
    assert not torch.equal(module(-x)[1], first[1])


def test_gradients_accumulate() -> None:
    model = adapted(tiny_llama())
    fused(model)
    model.zero_grad()
    for half in (IDS[:1], IDS[1:]):
        model(input_ids=half, use_cache=False).logits.square().sum().backward()
    halves = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    assert largest_error({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, halves) < 1e-5
