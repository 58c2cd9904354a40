"""Gated activations: h = act(gate) · up, and back, from gate and up side by side."""

# Triton reads annotations, which must be no strings.

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from qft.kernels.buffers import bordered_empty
from qft.kernels.float8 import Added, taken
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


TILE = {"LINES": 32, "SIZE": 64, "num_warps": 4, "num_stages": 1}
"""Rows and columns of a program that adds a product to what it reads."""


@jit
def _factors(x, narrow, row, column, there, within, x_stride, narrow_row, narrow_column, RANK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of x N, for some rows and columns."""
    place = tl.arange(0, RANK)
    right = narrow + place[:, None] * narrow_row + column.to(tl.int64)[None, :] * narrow_column
    return tl.load(x + row * x_stride + place[None, :], mask=there, other=0), tl.load(right, mask=within, other=0)


@jit
def _summed(number, left, right, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """A sum in float32, rounded as if it had been kept."""
    return (number.to(tl.float32) + tl.dot(left, right, input_precision="ieee")).to(KIND).to(tl.float32)


# What is waited for is asked for first: what stands behind a product would be asked for when that is done.


@jit
def _act_sum_kernel(  # type: ignore[no-untyped-def]
    both, out, rows, columns, stride, out_stride, half, x, narrow, x_stride, narrow_row, narrow_column,
    KIND: tl.constexpr, RANK: tl.constexpr, LINES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The same of gate and up with x N added, which are left as they are."""
    column = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    row = (tl.program_id(1) * LINES + tl.arange(0, LINES)).to(tl.int64)[:, None]
    kind = both.dtype.element_ty
    within = column[None, :] < columns
    there = (row < rows) & within
    at_gate = both + row * stride + column[None, :]
    of_up = narrow + half * narrow_row + columns.to(tl.int64) * narrow_column
    gate, up = tl.load(at_gate, mask=there, other=0), tl.load(at_gate + columns, mask=there, other=0)
    a, b = _factors(x, narrow, row, column, row < rows, within, x_stride, narrow_row, narrow_column, RANK)
    c, d = _factors(x + half, of_up, row, column, row < rows, within, x_stride, narrow_row, narrow_column, RANK)
    value, _ = _act(_summed(gate, a, b, kind), KIND)
    h = (value * _summed(up, c, d, kind)).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + column[None, :], h, mask=there)


@jit
def _act_back_sum_kernel(  # type: ignore[no-untyped-def]
    both, gradient, most, rows, columns, stride, gradient_stride,
    half, x, narrow, x_stride, narrow_row, narrow_column, gx, g_narrow, gx_stride, g_row, g_column,
    KIND: tl.constexpr, RANK: tl.constexpr, G_RANK: tl.constexpr, LINES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """x N added to gate and up, and the same to the gradient of h, and then as above; and the bits of the largest
    gradient of each row."""
    column = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    line = tl.program_id(1) * LINES + tl.arange(0, LINES)
    kind = both.dtype.element_ty
    row, within = line.to(tl.int64)[:, None], column[None, :] < columns
    there = (row < rows) & within
    at_gate, at_h = both + row * stride + column[None, :], gradient + row * gradient_stride + column[None, :]
    if RANK > 0:
        gate, up = tl.load(at_gate, mask=there, other=0), tl.load(at_gate + columns, mask=there, other=0)
    g = tl.load(at_h, mask=there, other=0)
    if RANK > 0:
        of_up = narrow + half * narrow_row + columns.to(tl.int64) * narrow_column
        a, b = _factors(x, narrow, row, column, row < rows, within, x_stride, narrow_row, narrow_column, RANK)
        c, d = _factors(x + half, of_up, row, column, row < rows, within, x_stride, narrow_row, narrow_column, RANK)
    if G_RANK > 0:
        e, f = _factors(gx, g_narrow, row, column, row < rows, within, gx_stride, g_row, g_column, G_RANK)
    if RANK > 0:
        gate, up = _summed(gate, a, b, kind), _summed(up, c, d, kind)
    if G_RANK > 0:
        g = _summed(g, e, f, kind)
    if RANK == 0:  # asked for before, they would be computed in the layout that the product has
        gate, up = tl.load(at_gate, mask=there, other=0), tl.load(at_gate + columns, mask=there, other=0)
    gate, up, g = gate.to(tl.float32), up.to(tl.float32), g.to(tl.float32)
    value, slope = _act(gate, KIND)
    of_gate, of_up = (g * up * slope).to(kind), (g * value).to(kind)
    tl.store(at_gate, of_gate, mask=there)
    tl.store(at_gate + columns, of_up, mask=there)
    tl.store(at_h, (value * up).to(kind), mask=there)
    bits = of_gate.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.maximum(bits, of_up.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.atomic_max(most + line, tl.max(bits, 1), mask=line < rows)


def activate(both: torch.Tensor, kind: str, border: int, lacking: Added | None = None) -> torch.Tensor:
    """h [rows, columns] with a border, of gate and up in `both` [rows, 2 columns], which are left as they are; they may
    be lacking what a kernel adds."""
    rows, columns = len(both), both.shape[1] // 2
    out = bordered_empty((rows, columns), border, both)
    if lacking is not None:
        launch(_act_sum_kernel, _grid(rows, columns),
            both, out, rows, columns, both.stride(0), out.stride(0), lacking.half, *_asked(lacking),
            KIND=KINDS[kind], RANK=_rank(lacking), **TILE,
        )  # fmt: skip
    elif by_triton(both):
        grid = (rows, ceil_div(columns, COLUMNS))
        launch(_act_kernel, grid, both, out, columns, both.stride(0), out.stride(0), KIND=KINDS[kind], SIZE=COLUMNS)
    else:
        gate, up = _wide(both).chunk(2, 1)
        out.copy_(REFERENCES[kind](gate) * up)
    return out


def activate_back(
    both: torch.Tensor,
    gradient: torch.Tensor,
    kind: str,
    lacking: Added | None = None,
    pending: Added | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of gate and up, side by side, and h, of gate and up in `both` and the gradient [rows, columns] of h,
    which lack what is `lacking` and `pending`. On a GPU they take the place of what they are made of. Where something
    was lacking or pending, the bits of the largest gradient of each row, too, [rows] in int32."""
    rows, columns = gradient.shape
    if pending is not None and not pending.fits(gradient):
        pending.to(gradient)
        pending = None
    if pending or lacking:
        most = torch.zeros(rows, dtype=torch.int32, device=both.device)
        launch(_act_back_sum_kernel, _grid(rows, columns),
            both, gradient, most, rows, columns, both.stride(0), gradient.stride(0),
            lacking.half if lacking else 0, *_asked(lacking), *_asked(pending),
            KIND=KINDS[kind], RANK=_rank(lacking), G_RANK=_rank(pending), **TILE,
        )  # fmt: skip
        return both, gradient, most
    if by_triton(both):
        numbers, grid = (columns, both.stride(0), gradient.stride(0)), (rows, ceil_div(columns, COLUMNS))
        launch(_act_back_kernel, grid, both, gradient, *numbers, KIND=KINDS[kind], SIZE=COLUMNS)
        return both, gradient, None
    with torch.enable_grad():
        gate, up = (part.detach().requires_grad_() for part in _wide(both).chunk(2, 1))
        h = REFERENCES[kind](gate) * up
    found = torch.autograd.grad(h, (gate, up), gradient.to(h.dtype))
    return torch.cat(found, 1).to(both.dtype), h.detach().to(both.dtype), None


def _asked(added: Added | None) -> tuple[Any, ...]:
    """x and N of what a kernel adds, and their strides."""
    return (added.x, added.narrow, added.x.stride(0), *added.narrow.stride()) if added else (None, None, 0, 0, 0)


def _rank(added: Added | None) -> int:
    """Columns that a kernel takes at once of what it adds."""
    return taken(added.half or added.rank) if added else 0


def _grid(rows: int, columns: int) -> tuple[int, int]:
    """Programs of the same rows one behind the other."""
    return ceil_div(columns, TILE["SIZE"]), ceil_div(rows, TILE["LINES"])


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


assert math.isclose(0.7978845608028654, math.sqrt(2 / math.pi))
