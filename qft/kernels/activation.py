"""Gated activations: h = act(gate) · up, and back, from gate and up side by side."""

# Triton reads annotations, which must be no strings.

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from qft.kernels.buffers import bordered_empty
from qft.kernels.jit import by_triton, ceil_div, jit, launch, power_of_2, tl

REFERENCES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}
KINDS = {name: number for number, name in enumerate(REFERENCES)}
COLUMNS = 1024
WIDEST = 64
"""Ranks that the kernel of the backward pass takes along."""
LINES, SIZE, SPLITS, WARPS = 32, 64, 4, 4


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
    both, gradient, gb, inner, of_a, of_gate, of_up, rows, columns, part, stride, gradient_stride,
    gb_stride, inner_stride, down_rank, gate_rank, up_rank,
    KIND: tl.constexpr, DOWN: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr,
    LINES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """SIZE columns of `part` rows: gradients of gate and up in their place, h in that of its gradient, and these rows'
    part of the gradients of A behind h and of B before gate and up, where DOWN, GATE and UP are not 0."""
    column = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, rows)
    kind = both.dtype.element_ty
    sum_a = tl.zeros((DOWN if DOWN else 1, SIZE), dtype=tl.float32)
    sum_gate = tl.zeros((SIZE, GATE if GATE else 1), dtype=tl.float32)
    sum_up = tl.zeros((SIZE, UP if UP else 1), dtype=tl.float32)
    for first in range(begin, end, LINES):
        line = first + tl.arange(0, LINES)
        row = line.to(tl.int64)[:, None]
        there = (row < end) & (column[None, :] < columns)
        at_gate = both + row * stride + column[None, :]
        at_h = gradient + row * gradient_stride + column[None, :]
        gate = tl.load(at_gate, mask=there, other=0).to(tl.float32)
        up = tl.load(at_gate + columns, mask=there, other=0).to(tl.float32)
        g = tl.load(at_h, mask=there, other=0).to(tl.float32)
        value, slope = _act(gate, KIND)
        of_gates, of_ups, h = (g * up * slope).to(kind), (g * value).to(kind), (value * up).to(kind)
        tl.store(at_gate, of_gates, mask=there)
        tl.store(at_gate + columns, of_ups, mask=there)
        tl.store(at_h, h, mask=there)
        if DOWN:
            place = tl.arange(0, DOWN)[:, None]
            mask = (place < down_rank) & (line[None, :] < end)
            narrow = tl.load(gb + line.to(tl.int64)[None, :] * gb_stride + place, mask=mask, other=0)
            sum_a = tl.dot(narrow, h, sum_a, input_precision="ieee")
        if GATE:
            place = tl.arange(0, GATE)[None, :]
            narrow = tl.load(inner + row * inner_stride + place, mask=(place < gate_rank) & (row < end), other=0)
            sum_gate = tl.dot(tl.trans(of_gates), narrow, sum_gate, input_precision="ieee")
        if UP:
            place = tl.arange(0, UP)[None, :]
            at = inner + gate_rank + row * inner_stride + place
            narrow = tl.load(at, mask=(place < up_rank) & (row < end), other=0)
            sum_up = tl.dot(tl.trans(of_ups), narrow, sum_up, input_precision="ieee")
    split = tl.program_id(1).to(tl.int64)
    if DOWN:
        place = tl.arange(0, DOWN)[:, None]
        target = of_a + (split * down_rank + place) * columns + column[None, :]
        tl.store(target, sum_a, mask=(place < down_rank) & (column[None, :] < columns))
    if GATE:
        place = tl.arange(0, GATE)[None, :]
        target = of_gate + (split * columns + column[:, None]) * gate_rank + place
        tl.store(target, sum_gate, mask=(place < gate_rank) & (column[:, None] < columns))
    if UP:
        place = tl.arange(0, UP)[None, :]
        target = of_up + (split * columns + column[:, None]) * up_rank + place
        tl.store(target, sum_up, mask=(place < up_rank) & (column[:, None] < columns))


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


@dataclass
class Backward:
    """What the backward pass of an activation makes."""

    both: torch.Tensor
    """Gradients of gate and up, side by side [rows, 2 columns]."""
    h: torch.Tensor
    """[rows, columns]"""
    of_a: torch.Tensor | None = None
    """Gradient [rank, columns] of A of the layer behind, in float32; None: it is still to be computed."""
    of_b: tuple[torch.Tensor, ...] = ()
    """Those [columns, rank] of B of gate and up, in float32; empty: they are still to be computed."""


def activate_back(
    both: torch.Tensor,
    gradient: torch.Tensor,
    kind: str,
    gb: torch.Tensor,
    inner: torch.Tensor,
    ranks: tuple[int, int],
) -> Backward:
    """Of gate and up in `both`, the gradient [rows, columns] of h, s g B [rows, rank] of the layer behind, and s x Aᵀ
    [rows, ranks] of gate and up. On a GPU, the gradients and h take the place of what they are made of."""
    rows, columns = gradient.shape
    if not by_triton(both):
        with torch.enable_grad():
            gate, up = (part.detach().requires_grad_() for part in _wide(both).chunk(2, 1))
            h = REFERENCES[kind](gate) * up
        found = torch.autograd.grad(h, (gate, up), gradient.to(h.dtype))
        return Backward(torch.cat(found, 1).to(both.dtype), h.detach().to(both.dtype))
    narrow = max(gb.shape[1], *ranks) <= WIDEST and both.dtype != torch.float64
    widths = [max(16, power_of_2(rank)) if narrow and rank else 0 for rank in (gb.shape[1], *ranks)]
    splits = min(SPLITS, ceil_div(rows, LINES))
    part = ceil_div(ceil_div(rows, splits), LINES) * LINES
    of_a, of_gate, of_up = (
        torch.empty(splits, *shape, dtype=torch.float32, device=both.device)
        for shape in ((gb.shape[1], columns), (columns, ranks[0]), (columns, ranks[1]))
    )
    launch(_act_back_kernel, (ceil_div(columns, SIZE), splits),
        both, gradient, gb, inner, of_a, of_gate, of_up, rows, columns, part,
        both.stride(0), gradient.stride(0), gb.stride(0), inner.stride(0), gb.shape[1], *ranks,
        KIND=KINDS[kind], DOWN=widths[0], GATE=widths[1], UP=widths[2], LINES=LINES, SIZE=SIZE, num_warps=WARPS,
    )  # fmt: skip
    if not narrow:
        return Backward(both, gradient)
    return Backward(both, gradient, of_a.sum(0), (of_gate.sum(0), of_up.sum(0)))


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


assert math.isclose(0.7978845608028654, math.sqrt(2 / math.pi))
