"""Where kernels may take the place of a model's own code: found by what modules hold and by trying them, whatever they
are called."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations
from types import FunctionType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from qft.kernels.activation import REFERENCES
from qft.kernels.dequantize import MOST
from qft.kernels.layer import Layer, layer_of
from qft.kernels.norm import MOST as WIDEST_NORM
from qft.kernels.rotary import rotate

CLOSE, SAME = 3e-2, 1e-5
"""Largest error, relative: of 16-bit results, and of an activation in float32."""


@dataclass
class MlpSeam:
    """A module that is down(act(gate(x)) · up(x))."""

    module: nn.Module
    layers: Sequence[Layer]
    """gate, up and down."""
    kind: str
    """Of the activation."""


@dataclass
class GroupSeam:
    """Linear layers of one module that are given the same tensor, in the order in which they are called."""

    layers: list[Layer]
    module: nn.Module | None
    """Theirs."""


@dataclass
class NormSeam:
    """A module that is x / sqrt(mean(x²) + eps) · (shift + weight)."""

    module: nn.Module
    eps: float
    shift: float
    dtype: torch.dtype
    """Of its output."""
    feeds: list[nn.Module] = field(default_factory=list)
    """Linear layers, or modules around them, that are given its output."""


@dataclass
class RotarySeam:
    """A module whose own code turns queries and keys by a function of its module's."""

    module: nn.Module
    name: str
    """Of the function, in the module's code."""
    rotate: Callable[..., Any]


@dataclass
class Seen:
    """What one forward pass showed."""

    calls: Counter[nn.Module]
    given: dict[nn.Module, torch.Tensor]
    """First arguments."""
    made: dict[nn.Module, torch.Tensor]
    """What came of the last call."""
    order: list[nn.Module]


def watch(model: nn.Module, run: Callable[[], Any]) -> Seen:
    """What the modules of a model are given and make while it is run."""
    seen = Seen(Counter(), {}, {}, [])

    def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(given, torch.Tensor) and isinstance(out, torch.Tensor):
            seen.calls[module] += 1
            seen.given[module], seen.made[module] = given, out
            seen.order.append(module)

    with ExitStack() as hooks, torch.no_grad():
        for module in model.modules():
            hooks.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        run()
    return seen


def linears(root: nn.Module) -> Iterator[nn.Module]:
    """Linear layers within a module that is none itself, those that an adapter is around as that."""
    for module in () if isinstance(root, LoraLayer) else root.children():
        if isinstance(module, LoraLayer | nn.Linear):
            yield module
        else:
            yield from linears(module)


def find_mlps(
    blocks: nn.Module, seen: Seen, plain: Counter[str], in_training: Callable[[nn.Module, torch.Tensor], Any]
) -> list[MlpSeam]:
    """MLPs that agree with their composition on what they were given. `plain` counts why others stay as they are;
    `in_training` tells what a module makes of a tensor while it trains."""
    found = []
    for module in list(blocks.modules()):
        own = list(linears(module))
        if len(own) != 3 or any(len(list(linears(child))) == 3 for child in module.children()):
            continue
        kind = _activation(module)
        if kind is None or seen.calls[module] != 1 or any(seen.calls[layer] != 1 for layer in own):
            continue
        order = next((order for order in permutations(own) if _composes(module, order, kind, seen)), None)
        if order is None:
            continue
        tried = [_layer(layer, seen) for layer in order]
        layers = [layer for layer in tried if isinstance(layer, Layer)]
        if reason := next((layer for layer in tried if isinstance(layer, str)), None):
            plain[f"MLPs: {reason}"] += 1
        elif len({dtype for layer in layers for dtype in (layer.dtype, layer.given, layer.made)}) > 1:
            plain["MLPs: they compute in float32 between their products"] += 1
        elif not _ends_with(order[2], partial(in_training, module, seen.given[module])):
            plain["MLPs: they change in training what their last product makes"] += 1
        else:
            found.append(MlpSeam(module, layers, kind))
    return found


@unset_fake_temporarily()
def _activation(module: nn.Module) -> str | None:
    """Its name, if beside linear layers and dropouts that drop nothing the module holds one and nothing else."""
    others = [m for m in module.modules() if m is not module and not _within_linear(module, m)]
    others = [m for m in others if not (isinstance(m, nn.Dropout) and m.p == 0) and not isinstance(m, nn.Identity)]
    others = [m for m in others if not any(child in others for child in m.children())]
    if len(others) != 1 or any(True for _ in others[0].parameters()):
        return None
    x = torch.linspace(-6, 6, 241)
    try:
        y = others[0](x)
    except Exception:  # a module can be anything
        return None
    same = (name for name, act in REFERENCES.items() if y.shape == x.shape and _error(y, act(x)) < SAME)
    return next(same, None)


def _within_linear(root: nn.Module, module: nn.Module) -> bool:
    return any(module is part for layer in linears(root) for part in layer.modules())


def _composes(module: nn.Module, order: Sequence[nn.Module], kind: str, seen: Seen) -> bool:
    gate, up, down = order
    x, y = seen.given[module], seen.made[module]
    if seen.given[gate].shape != x.shape or seen.given[up].shape != x.shape or seen.made[down].shape != y.shape:
        return False
    inner = REFERENCES[kind](seen.made[gate].float()) * seen.made[up].float()
    given = seen.given[down].float()
    same = inner.shape == given.shape and _error(given, inner) < CLOSE
    passed_on = all(seen.given[layer] is x for layer in (gate, up))
    return same and passed_on and seen.made[down] is y


def _ends_with(layer: nn.Module, run: Callable[[], Any]) -> bool:
    """Whether what comes of a run is what the layer made."""
    made: list[Any] = []
    hook = layer.register_forward_hook(lambda _, __, out: made.append(out))
    try:
        return run() is made[-1]
    except Exception:  # a module can be anything
        return False
    finally:
        hook.remove()


def find_groups(
    blocks: nn.Module, seen: Seen, taken: set[nn.Module], plain: Counter[str], *, frozen: bool = False
) -> list[GroupSeam]:
    """Linear layers by the tensor and the module that they are given it in, without those `taken`; `frozen`: groups in
    which no layer has an adapter, too."""
    groups: dict[tuple[int, nn.Module | None], list[Layer]] = {}
    parents = {child: parent for parent in blocks.modules() for child in parent.children()}
    own = set(linears(blocks))
    for module in seen.order:
        if module not in own or module in taken:
            continue
        layer = _layer(module, seen) if seen.calls[module] == 1 else "it is called several times"
        if isinstance(layer, str):
            plain[f"linear layers: {layer}"] += 1
        else:
            groups.setdefault((id(seen.given[module]), parents.get(module)), []).append(layer)
    return [GroupSeam(part, parent) for (_, parent), layers in groups.items() for part in _alike(layers, frozen)]


def _layer(module: nn.Module, seen: Seen) -> Layer | str:
    """As layer_of, if the layer is given and makes numbers of the dtype that it multiplies in, or of float32."""
    layer = layer_of(module)
    if isinstance(layer, str):
        return layer
    given, made = seen.given[module].dtype, seen.made[module].dtype
    if {given, made} <= {layer.dtype, torch.float32}:
        return replace(layer, given=given, made=made)
    dtypes = {str(dtype).removeprefix("torch.") for dtype in (layer.dtype, given, made)}
    return f"it mixes {', '.join(sorted(dtypes))}"


def _alike(layers: list[Layer], frozen: bool) -> Iterator[list[Layer]]:
    """As many of the same dtypes at once as a matrix holds, some of them with an adapter unless `frozen`."""
    for dtypes in dict.fromkeys((layer.dtype, layer.made) for layer in layers):
        own = [layer for layer in layers if (layer.dtype, layer.made) == dtypes]
        parts = [own[i : i + MOST] for i in range(0, len(own), MOST)]
        yield from (part for part in parts if frozen or any(layer.adapter for layer in part))


def find_norms(model: nn.Module, seen: Seen) -> list[NormSeam]:
    """RMS norms, each with what it feeds."""
    found = []
    for module in seen.calls:
        weights = list(module.parameters())
        if len(weights) != 1 or any(True for _ in (*module.children(), *module.buffers())):
            continue
        if weights[0].ndim != 1 or len(weights[0]) > WIDEST_NORM:
            continue
        if seen.given[module].shape != seen.made[module].shape or seen.made[module].shape[-1:] != weights[0].shape:
            continue
        numbers = {v for k, v in vars(module).items() if isinstance(v, float) and 0 < v < 1e-2}
        tried = (NormSeam(module, eps, shift, seen.made[module].dtype) for eps in numbers for shift in (0.0, 1.0))
        if seam := next((seam for seam in tried if _is_norm(seam, seen.given[module])), None):
            seam.feeds = [m for m in seen.order if seen.given[m] is seen.made[module]]
            found.append(seam)
    return found


@unset_fake_temporarily()
def _is_norm(seam: NormSeam, given: torch.Tensor) -> bool:
    """On numbers of usual size, and on some so small that eps counts, with other weights than its own."""
    ((name, own),) = seam.module.named_parameters()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(len(own), generator=generator).to(given.device, own.dtype)
    x = torch.randn(8, len(own), generator=generator).to(given.device, given.dtype)
    for size in (1.0, 0.5 * seam.eps**0.5):
        try:
            with torch.no_grad():
                out = torch.func.functional_call(seam.module, {name: weight}, (x * size,)).float()
        except Exception:  # a module can be anything: one with a gate beside its input, say
            return False
        wide = (x * size).float()
        wanted = wide * (wide.square().mean(-1, keepdim=True) + seam.eps).rsqrt() * (weight.float() + seam.shift)
        if not _error(out, wanted) < 1e-2:
            return False
    return True


def find_rotary(blocks: nn.Module, seen: Seen) -> list[RotarySeam]:
    """Modules around linear layers whose code calls one function (q, k, cos, sin) that turns both by halves."""
    found, tried = [], dict[Any, bool]()
    for module in blocks.modules():
        forward = inspect.unwrap(type(module).forward)
        if "forward" in vars(module) or not isinstance(forward, FunctionType) or not next(linears(module), None):
            continue
        named = ((name, forward.__globals__.get(name)) for name in forward.__code__.co_names)
        for name, function in named:
            if not isinstance(function, FunctionType):
                continue
            if function not in tried:
                tried[function] = _turns(function)
            if tried[function]:
                found.append(RotarySeam(module, name, function))
    return found


@unset_fake_temporarily()
def _turns(function: Callable[..., Any]) -> bool:
    asked = [p.default for p in inspect.signature(function).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    if asked[:4] != [inspect.Parameter.empty] * 4 or inspect.Parameter.empty in asked[4:]:
        return False
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 5, 8), (2, 2, 5, 8), (2, 5, 8), (2, 5, 8)
    q, k, cos, sin = (torch.randn(shape, generator=generator) for shape in shapes)
    try:
        found = function(q, k, cos, sin)
        wanted = rotate(q, k, cos, sin)
        return all(a.shape == b.shape and _error(a, b) < SAME for a, b in zip(found, wanted, strict=True))
    except Exception:  # a function can be anything
        return False


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative; of tensors without contents none."""
    if isinstance(found, FakeTensor) or isinstance(wanted, FakeTensor):
        return 0.0
    return float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-30))
