"""The borders of a dequantized matrix: B of each layer behind its rows, A below all, zeros elsewhere."""

# Triton reads annotations, which must be no strings.

from typing import Any

import torch

from qft.kernels.dequantize import MOST
from qft.kernels.jit import by_triton, ceil_div, jit, launch, tl

ROWS, COLUMNS = 64, 512


@jit
def _border_kernel(  # type: ignore[no-untyped-def]
    right, below, rows, columns, right_stride, below_stride, row_programs, column_programs,
    a0, b0, c0, s0, r0, m0, a1, b1, c1, s1, r1, m1, a2, b2, c2, s2, r2, m2, a3, b3, c3, s3, r3, m3,
    COUNT: tl.constexpr, BIAS: tl.constexpr, BIASED: tl.constexpr, SCALE_A: tl.constexpr,
    BORDER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The first programs write the columns behind ROWS rows each, the others COLUMNS columns of the rows below. Of each
    layer: A, B, bias, scaling, rank, rows."""
    program = tl.program_id(0)
    if program < row_programs:
        row = (program * ROWS + tl.arange(0, ROWS))[:, None]
        for first in range(0, BORDER, 64):
            last = (first + tl.arange(0, 64))[None, :]
            value = tl.zeros((ROWS, 64), dtype=tl.float32)
            start, rank = 0, 0
            for i in tl.static_range(COUNT):
                b = b0 if i == 0 else b1 if i == 1 else b2 if i == 2 else b3
                c = c0 if i == 0 else c1 if i == 1 else c2 if i == 2 else c3
                s = s0 if i == 0 else s1 if i == 1 else s2 if i == 2 else s3
                r = r0 if i == 0 else r1 if i == 1 else r2 if i == 2 else r3
                m = m0 if i == 0 else m1 if i == 1 else m2 if i == 2 else m3
                own = (row >= start) & (row < start + m)
                mine = own & (last >= rank) & (last < rank + r)
                found = tl.load(b + (row - start) * r + last - rank, mask=mine, other=0).to(tl.float32)
                value = tl.where(mine, found if SCALE_A else found * s, value)
                if (BIASED >> i) & 1:
                    at = own & (last == BIAS)
                    value = tl.where(at, tl.load(c + row - start, mask=at, other=0).to(tl.float32), value)
                start += m
                rank += r
            target = right + row.to(tl.int64) * right_stride + last
            tl.store(target, value.to(right.dtype.element_ty), mask=row < rows)
    else:
        column = (program - row_programs) * COLUMNS + tl.arange(0, COLUMNS)
        within = column[None, :] < columns
        for first in range(0, BORDER, 16):
            line = first + tl.arange(0, 16)
            content = tl.zeros((16, COLUMNS), dtype=tl.float32)
            begin = 0
            for i in tl.static_range(COUNT):
                a = a0 if i == 0 else a1 if i == 1 else a2 if i == 2 else a3
                factor = s0 if i == 0 else s1 if i == 1 else s2 if i == 2 else s3
                width = r0 if i == 0 else r1 if i == 1 else r2 if i == 2 else r3
                ours = (line[:, None] >= begin) & (line[:, None] < begin + width) & within
                given = a + (line[:, None] - begin) * columns + column[None, :]
                given = tl.load(given, mask=ours, other=0).to(tl.float32)
                content = tl.where(ours, given * factor if SCALE_A else given, content)
                begin += width
            lower = below + line.to(tl.int64)[:, None] * below_stride + column[None, :]
            tl.store(lower, content.to(below.dtype.element_ty), mask=within)


def write(right: torch.Tensor, below: torch.Tensor, stack: Any, *, forward: bool) -> None:
    """Into `right` [rows, border] B of each layer of `stack`, and into `below` [border, columns] A, one of them scaled:
    A if `forward`, else B. If forward, biases behind the last rank, where there are any."""
    if not by_triton(right):
        _reference(right, below, stack, forward=forward)
        return
    arguments: list[Any] = []
    biases = [layer.bias if stack.has_bias else None for layer in stack.layers]
    for layer, bias in zip(stack.layers, biases, strict=True):
        a, b = layer.pair
        arguments += (right, right) if a is None else (a, b)
        arguments += (bias, layer.scaling, layer.rank, layer.rows)
    arguments += (None,) * 6 * (MOST - len(stack.layers))
    biased = sum((bias is not None) << i for i, bias in enumerate(biases)) if forward else 0
    row_programs, column_programs = ceil_div(stack.rows, ROWS), ceil_div(stack.columns, COLUMNS)
    launch(_border_kernel, (row_programs + column_programs,),
        right, below, stack.rows, stack.columns, right.stride(0), below.stride(0), row_programs, column_programs,
        *arguments, COUNT=len(stack.layers), BIAS=stack.rank, BIASED=biased, SCALE_A=forward,
        BORDER=stack.border, ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip


def _reference(right: torch.Tensor, below: torch.Tensor, stack: Any, *, forward: bool) -> None:
    right.zero_()
    below.zero_()
    for layer, row, rank in zip(stack.layers, stack.row_parts, stack.rank_parts, strict=True):
        a, b = layer.pair
        if a is not None:
            below[rank] = a.detach() * layer.scaling if forward else a.detach()
            right[row, rank] = b.detach() if forward else b.detach() * layer.scaling
        if forward and layer.bias is not None:
            right[row, stack.rank] = layer.bias
