"""RMS norms: y = x / sqrt(mean(x²) + eps) · (shift + w), in float32 with one rounding, and back."""

# Triton reads annotations, which must be no strings.

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qft.kernels.buffers import bordered_empty, rows_of
from qft.kernels.jit import by_triton, ceil_div, jit, launch, power_of_2, tl
from qft.kernels.keep import Keep, Source, note_source

MOST = 32768
"""Columns that one program takes at once."""
PROGRAMS = 512
"""Of the backward pass, each with sums of its own for the gradient of the weight."""


@jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    x, w, y, scales, rows, columns, stride, out_stride, eps, shift, LINES: tl.constexpr, SIZE: tl.constexpr
):
    row = (tl.program_id(0) * LINES + tl.arange(0, LINES)).to(tl.int64)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    there = (row < rows) & (column < columns)
    value = tl.load(x + row * stride + column, mask=there, other=0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / columns + eps)
    weight = tl.load(w + column, mask=column < columns, other=0).to(tl.float32) + shift
    result = value * scale[:, None] * weight
    tl.store(y + row * out_stride + column, result.to(y.dtype.element_ty), mask=there)
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    tl.store(scales + line, scale, mask=line < rows)


@jit
def _norm_back_kernel(  # type: ignore[no-untyped-def]
    g, x, w, scales, dx, dw, rows, columns, g_stride, stride, shift,
    LINES: tl.constexpr, SIZE: tl.constexpr, TRAINED: tl.constexpr,
):  # fmt: skip
    """Every so many LINES of rows as there are programs."""
    column = tl.arange(0, SIZE)[None, :]
    weight = tl.load(w + column, mask=column < columns, other=0).to(tl.float32) + shift
    total = tl.zeros((LINES, SIZE), dtype=tl.float32)
    for first in range(tl.program_id(0) * LINES, rows, tl.num_programs(0) * LINES):
        line = first + tl.arange(0, LINES)
        row = line.to(tl.int64)[:, None]
        there = (row < rows) & (column < columns)
        value = tl.load(x + row * stride + column, mask=there, other=0).to(tl.float32)
        gradient = tl.load(g + row * g_stride + column, mask=there, other=0).to(tl.float32)
        scale = tl.load(scales + line, mask=line < rows, other=0)[:, None]
        even = value * scale
        inner = gradient * weight
        mean = tl.sum(inner * even, 1)[:, None] / columns
        result = (inner - even * mean) * scale
        tl.store(dx + row * columns + column, result.to(dx.dtype.element_ty), mask=there)
        if TRAINED:
            total += gradient * even
    if TRAINED:
        place = dw + tl.program_id(0).to(tl.int64) * columns + column
        tl.store(place, tl.sum(total, 0)[None, :], mask=column < columns)


def _shape(columns: int) -> dict[str, int]:
    """Of what one program takes at once."""
    size = power_of_2(columns)
    return {"SIZE": size, "LINES": max(1, 1024 // size), "num_warps": 4 if size <= 2048 else 8 if size <= 8192 else 16}


def normed(
    x: torch.Tensor, w: torch.Tensor, eps: float, shift: float, dtype: torch.dtype, border: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [..., columns] in `dtype`, with a border if one is asked for, and 1 / sqrt(mean(x²) + eps) [rows] in float32,
    of x [..., columns] and w [columns]."""
    like = x if x.dtype == dtype else x.new_empty(0, dtype=dtype)
    made = bordered_empty(x.shape, border, like) if border else x.new_empty(x.shape, dtype=dtype)
    x, y = rows_of(x), rows_of(made)
    rows, columns = x.shape
    if not by_triton(x):
        wide = x if x.dtype == torch.float64 else x.float()
        scale = (wide.square().mean(1) + eps).rsqrt()
        y.copy_(wide * scale[:, None] * (w.to(wide.dtype) + shift))
        return made, scale
    scales, shape = torch.empty(rows, dtype=torch.float32, device=x.device), _shape(columns)
    grid = (ceil_div(rows, shape["LINES"]),)
    launch(_norm_kernel, grid, x, w, y, scales, rows, columns, x.stride(0), y.stride(0), eps, shift, **shape)
    return made, scales


def normed_back(
    g: torch.Tensor, x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, shift: float, *, trained: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of x [rows, columns] and, if it is trained, of w [columns]."""
    rows, columns = x.shape
    if not by_triton(x):
        wide = x.to(scales.dtype)
        even, g = wide * scales[:, None], g.to(scales.dtype)
        inner = g * (w.to(scales.dtype) + shift)
        dx = (inner - even * (inner * even).mean(1, keepdim=True)) * scales[:, None]
        return dx.to(x.dtype), (g * even).sum(0).to(w.dtype) if trained else None
    shape = _shape(columns)
    programs = min(PROGRAMS, ceil_div(rows, shape["LINES"])) if trained else ceil_div(rows, shape["LINES"])
    dx = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    dw = torch.empty(programs, columns, dtype=torch.float32, device=x.device) if trained else scales
    numbers = (rows, columns, g.stride(0), x.stride(0), shift)
    launch(_norm_back_kernel, (programs,), g, x, w, scales, dx, dw, *numbers, TRAINED=trained, **shape)
    return dx, dw.sum(0).to(w.dtype) if trained else None


def rms_norm(
    x: torch.Tensor,
    w: torch.Tensor,
    eps: float,
    shift: float,
    dtype: torch.dtype,
    border: int = 0,
    keep: Keep | None = None,
) -> torch.Tensor:
    """x [..., columns] -> [..., columns] in `dtype`, with a border of so many columns; its rows lie in memory in the
    order of those of x. `keep`: of its block."""
    order = sorted(range(x.dim() - 1), key=lambda i: x.stride()[i], reverse=True)
    turned = order != list(range(x.dim() - 1))
    given = x.permute(*order, x.dim() - 1) if turned else x
    found: torch.Tensor = Norm.apply(given, w, eps, shift, dtype, border, keep)  # type: ignore[no-untyped-call]
    return found.permute(*(order.index(i) for i in range(x.dim() - 1)), x.dim() - 1) if turned else found


class Norm(torch.autograd.Function):
    """See rms_norm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor,
        eps: float,
        shift: float,
        dtype: torch.dtype,
        border: int,
        keep: Keep | None,
    ) -> torch.Tensor:
        weight = w.detach()
        y, scales = normed(x, weight, eps, shift, dtype, border)
        ctx.shift, ctx.source = shift, None
        if keep and not keep.norms:
            ctx.source = Source(x, lambda x, wide: normed(x, weight, eps, shift, dtype, wide)[0], keep.stash)
            note_source(y, ctx.source)
        ctx.save_for_backward(None if ctx.source else x, w, scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w, scales = ctx.saved_tensors
        trained = ctx.needs_input_grad[1]
        if ctx.source:
            x = ctx.source.x
            ctx.source.forget()
        dx, dw = normed_back(rows_of(g), rows_of(x), w.detach(), scales, ctx.shift, trained=trained)
        return dx.view(x.shape), dw, None, None, None, None, None
