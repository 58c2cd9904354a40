"""Gated activations: h = act(gate) · up, and back, from gate and up side by side."""

# Triton reads annotations, which must be no strings.

import math
from collections.abc import Callable

import torch
from torch.nn import functional

from qft.kernels.buffers import bordered_empty
from qft.kernels.jit import by_triton, ceil_div, jit, launch, tl

REFERENCES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}
KINDS = {name: number for number, name in enumerate(REFERENCES)}
COLUMNS = 1024


@jit
def _act(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(x) and its derivative."""
    if KIND == 0:
        sigmoid = tl.sigmoid(x)
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
    elif KIND == 1:
        cumulative = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * cumulative, cumulative + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == 2:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        tanh = 2 * tl.sigmoid(2 * inner) - 1
        slope = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
        return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * slope
    else:
        return tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)


@jit
def _act_kernel(  # type: ignore[no-untyped-def]
    both, out, columns, stride, out_stride, KIND: tl.constexpr, SIZE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    there = column < columns
    gate = tl.load(both + row * stride + column, mask=there, other=0).to(tl.float32)
    up = tl.load(both + row * stride + columns + column, mask=there, other=0).to(tl.float32)
    value, _ = _act(gate, KIND)
    tl.store(out + row * out_stride + column, (value * up).to(out.dtype.element_ty), mask=there)


@jit
def _act_back_kernel(  # type: ignore[no-untyped-def]
    both, gradient, columns, stride, gradient_stride, KIND: tl.constexpr, SIZE: tl.constexpr
):
    """Gradients of gate and up in their place, and h in that of its gradient."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    there = column < columns
    at_gate = both + row * stride + column
    at_h = gradient + row * gradient_stride + column
    gate = tl.load(at_gate, mask=there, other=0).to(tl.float32)
    up = tl.load(at_gate + columns, mask=there, other=0).to(tl.float32)
    g = tl.load(at_h, mask=there, other=0).to(tl.float32)
    value, slope = _act(gate, KIND)
    kind = both.dtype.element_ty
    tl.store(at_gate, (g * up * slope).to(kind), mask=there)
    tl.store(at_gate + columns, (g * value).to(kind), mask=there)
    tl.store(at_h, (value * up).to(kind), mask=there)


def activate(both: torch.Tensor, kind: str, border: int) -> torch.Tensor:
    """h [rows, columns] with a border, of gate and up in `both` [rows, 2 columns]."""
    rows, columns = len(both), both.shape[1] // 2
    out = bordered_empty((rows, columns), border, both)
    if by_triton(both):
        grid = (rows, ceil_div(columns, COLUMNS))
        launch(_act_kernel, grid, both, out, columns, both.stride(0), out.stride(0), KIND=KINDS[kind], SIZE=COLUMNS)
    else:
        gate, up = _wide(both).chunk(2, 1)
        out.copy_(REFERENCES[kind](gate) * up)
    return out


def activate_back(both: torch.Tensor, gradient: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up, side by side, and h, of gate and up in `both` and the gradient [rows, columns] of h. On
    a GPU they take the place of what they are made of."""
    rows, columns = gradient.shape
    if by_triton(both):
        numbers, grid = (columns, both.stride(0), gradient.stride(0)), (rows, ceil_div(columns, COLUMNS))
        launch(_act_back_kernel, grid, both, gradient, *numbers, KIND=KINDS[kind], SIZE=COLUMNS)
        return both, gradient
    with torch.enable_grad():
        gate, up = (part.detach().requires_grad_() for part in _wide(both).chunk(2, 1))
        h = REFERENCES[kind](gate) * up
    found = torch.autograd.grad(h, (gate, up), gradient.to(h.dtype))
    return torch.cat(found, 1).to(both.dtype), h.detach().to(both.dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


assert math.isclose(0.7978845608028654, math.sqrt(2 / math.pi))
