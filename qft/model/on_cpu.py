"""Training on a CPU: a frozen layer and its adapter as one function, and attention of short rows written out.

Both compute what the libraries do, in the same dtypes and in fewer passes over memory. Layers are told by what they
hold and by trying; evaluation, merging and whatever else is no training take the library's own path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from qft.quant.dequantize import dequantized_weight

SHORT = 160
"""Tokens up to which torch's own attention is slower than products of whole rows, by far in its backward pass."""
ALIKE = 0.03
"""Largest relative difference between what a layer gives and what it is replaced by, in 16 bits."""


def join_adapters(model: nn.Module, bring: Callable[[nn.Module], None] | None = None) -> int:
    """Have each frozen layer of 16 bits that has one adapter computed together with it, in training; returns how many
    are. `bring` has the weights of a layer there, if they wait elsewhere and its block has them brought."""
    agrees: dict[Any, bool] = {}
    joined, modules = 0, list[Any](model.modules())
    for module in modules:
        pair = _pair(module)
        if pair is None or (module.base_layer._forward_hooks and not bring):
            continue
        kind = (type(module), type(module.base_layer), *(each.shape for each in pair), _scaling(module))
        if kind not in agrees:
            if bring:
                bring(module.base_layer)
            agrees[kind] = _agrees(module, *pair)
        if agrees[kind]:
            module.forward = partial(_forward, module, module.forward)
            joined += 1
    return joined


def _scaling(module: Any) -> float:
    return float(module.scaling[module.active_adapters[0]])


def _pair(module: Any) -> tuple[nn.Parameter, nn.Parameter] | None:
    """A and B of the one adapter of a frozen layer, if they are all that is trained of it; else None."""
    names = ("base_layer", "lora_A", "lora_B", "scaling", "active_adapters")
    if not all(hasattr(module, name) for name in names) or len(module.active_adapters) != 1:
        return None
    name, base = module.active_adapters[0], module.base_layer
    if name not in module.lora_A or not isinstance(base, nn.Linear) or not _is_plain(base):
        return None
    if type(module.lora_dropout[name]) not in (nn.Identity, nn.Dropout):
        return None
    if module._forward_hooks or any("forward" in vars(each) or each._forward_pre_hooks for each in (module, base)):
        return None  # somebody else has a hand in it
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    rank = a.shape[0]
    fits = a.shape == (rank, base.in_features) and b.shape == (base.out_features, rank)
    return (a, b) if fits and len(trained) == 2 and trained[0] is a and trained[1] is b else None


def _is_plain(base: nn.Linear) -> bool:
    """Whether it multiplies with what its weight is dequantized to: LLM.int8() rounds activations, too."""
    unquantized = type(base) is nn.Linear and type(base.weight) is nn.Parameter
    return unquantized or isinstance(base.weight, bnb.nn.Params4bit)


def _forward(module: Any, forward: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    plain = args or kwargs or not (torch.is_grad_enabled() and module.training) or module.merged
    # What a layer in 4 bits is asked to multiply in.
    asked = getattr(module.base_layer, "compute_dtype", None) or x.dtype
    if plain or module.disable_adapters or x.dtype != asked or asked not in (torch.bfloat16, torch.float16):
        result: torch.Tensor = forward(x, *args, **kwargs)
        return result
    return _joined(module, x)


def _joined(module: Any, x: torch.Tensor) -> torch.Tensor:
    name = module.active_adapters[0]
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    rows = x.reshape(-1, x.shape[-1])  # out here: a model may add to what comes out of a layer in its place
    dropout = module.lora_dropout[name]
    left = dropout(torch.ones_like(rows)) if isinstance(dropout, nn.Dropout) else None
    made: torch.Tensor = _Joined.apply(rows, left, a, b, module.base_layer, _scaling(module))  # type: ignore[no-untyped-call]
    return made.view(*x.shape[:-1], -1)


class _Joined(torch.autograd.Function):
    """x · Wᵀ + bias + scaling · ((left · x) Aᵀ) · Bᵀ, with W as its layer holds it; x: [rows, in], and left, as large,
    what dropout leaves of each number for the adapter; None: all.

    The adapter's part comes first and the wide product is summed onto it, in float32, to be rounded once. Added to what
    is rounded already, it would vanish wherever it is less than half of that's last bit, as it is in the first steps.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, left: Any, a: torch.Tensor, b: torch.Tensor, layer: Any, scaling: float
    ) -> torch.Tensor:
        dtype, weight = rows.dtype, dequantized_weight(layer).to(rows.dtype)
        narrow, wide = a.to(dtype), (b * scaling).to(dtype)
        within = (rows if left is None else rows * left) @ narrow.t()
        made = (within @ wide.t()).addmm_(rows, weight.t())
        if layer.bias is not None:
            made += layer.bias.to(dtype)
        ctx.save_for_backward(rows, left, within, narrow, wide)
        ctx.layer, ctx.scaling, ctx.dtypes = layer, scaling, (a.dtype, b.dtype)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, left, within, narrow, wide = ctx.saved_tensors
        back = slopes @ wide
        of_a = (back.t() @ (rows if left is None else rows * left)).to(ctx.dtypes[0])
        of_b = (slopes.t() @ within).to(ctx.dtypes[1]) * ctx.scaling
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = back @ narrow
            of_x = of_x if left is None else of_x.mul_(left)
            of_x.addmm_(slopes, dequantized_weight(ctx.layer).to(slopes.dtype))
        return of_x, None, of_a, of_b, None, None


def _agrees(module: Any, a: nn.Parameter, b: nn.Parameter) -> bool:
    """Whether both ways give the same, and the same gradients, with a B that is not zero."""
    was, training = b.detach().clone(), module.training
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(8, a.shape[1], generator=draw).to(torch.bfloat16).requires_grad_()
    found = []
    try:
        module.train()
        b.data.copy_(torch.randn(b.shape, generator=draw) * was.shape[1] ** -0.5)
        for way in (module.forward, partial(_joined, module)):
            with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # for dropout
                made = way(x)
            slope = torch.randn(made.shape, generator=draw.manual_seed(1)).to(made.dtype)
            found.append((made.detach(), *torch.autograd.grad(made, (x, a, b), slope)))
    except Exception:  # a layer can be anything
        return False
    finally:
        b.data.copy_(was)
        module.train(training)
    return all(
        one.dtype == other.dtype and float((one - other).float().norm()) <= ALIKE * float(one.float().norm())
        for one, other in zip(*found, strict=True)
    )


@contextmanager
def short_attention() -> Iterator[None]:
    """While entered, causal attention of short rows in 16 bits on a CPU is written out, forward and backward."""
    torchs = functional.scaled_dot_product_attention

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        own = {name: each for name, each in kwargs.items() if each is not None and name not in ("scale", "enable_gqa")}
        if args or own not in ({"is_causal": True}, {"is_causal": True, "dropout_p": 0.0}) or not _short(query, key):
            return torchs(query, key, value, *args, **kwargs)
        return _written_out(query, key, value, kwargs.get("scale"))

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = torchs


def _short(query: torch.Tensor, key: torch.Tensor) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.device.type == "cpu" and half and query.dim() == 4 and query.shape[2] == key.shape[2] <= SHORT


def _written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Of queries [rows, heads, tokens, size], and keys and values of as many heads or a divisor of them."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    made: torch.Tensor = _Attention.apply(query, key, value, factor)  # type: ignore[no-untyped-call]
    return made


class _Attention(torch.autograd.Function):
    """Keeps what it is given, and computes its shares again."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        shares = _shares(_folded(query, key), key, scale).to(value.dtype)
        return (shares @ value).view(*query.shape[:3], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        folded, slopes = _folded(query, key), _folded(slope, key)
        shares = _shares(folded, key, ctx.scale)
        of_value = shares.to(value.dtype).transpose(2, 3) @ slopes
        of_shares = (slopes @ value.transpose(2, 3)).float()
        # Of softmax; a share of zero, behind a token, has no slope.
        of_scores = shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True)) * ctx.scale
        of_scores = of_scores.to(query.dtype)
        return (of_scores @ key).view(query.shape), of_scores.transpose(2, 3) @ folded, of_value, None


def _folded(queries: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Heads that share keys as so many more queries of them: [rows, heads of keys, groups x tokens, size]."""
    return queries.reshape(len(queries), key.shape[1], -1, queries.shape[-1])


def _shares(folded: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """What each query takes of each value up to its own, in float32."""
    tokens = key.shape[2]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=key.device).triu(1)
    with torch.autocast("cpu", enabled=False):
        scores = (folded.float() * scale) @ key.float().transpose(2, 3)
    scores.view(len(key), -1, tokens, tokens).masked_fill_(later, float("-inf"))
    return scores.softmax(-1)
