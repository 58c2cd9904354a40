"""Rows of activations and gradients in float8 (e4m3), each with a scale; if need be, with their product with a narrow
matrix in the same pass."""

# Triton reads annotations, which must be no strings.

from dataclasses import dataclass

import torch

from qft.kernels.float8 import E4M3, LARGEST, Factor, power_for
from qft.kernels.jit import by_triton, ceil_div, jit, launch, power_of_2, tl

SPAN, WARPS = 4096, 8
"""Columns of a row at once, and by how many warps."""
PART = {"LINES": 32, "SIZE": 256, "WIDTH": 2048, "num_warps": 4}
"""Rows, columns at once, and columns in all of a program that makes a product, too."""
WIDEST = 64
"""Columns of a product that is made in the same pass."""
LINES = 16
"""Rows of a program that sums up parts."""


@jit
def _scales(bits, dither, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of rows by the bits of their largest number, and what they are multiplied with."""
    exponent = bits >> 23
    power = tl.maximum(exponent - LARGEST, 1)
    scale = tl.where(exponent == 255, 0x7FC00000, power << 23).to(tl.float32, bitcast=True)
    return scale * dither, ((254 - power) << 23).to(tl.float32, bitcast=True) / dither


@jit
def _round_kernel(  # type: ignore[no-untyped-def]
    x, out, scales, most, columns, x_stride, weight, dither,
    LARGEST: tl.constexpr, SPAN: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """Row program_id(0): its largest number, unless it is KNOWN, then each divided by the scale."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SPAN)
    if KNOWN:
        bits = tl.load(most + row)
    else:
        highest = tl.zeros((SPAN,), dtype=tl.int32)
        for first in range(0, columns, SPAN):
            value = tl.load(x + row * x_stride + first + column, mask=first + column < columns, other=0).to(tl.float32)
            highest = tl.maximum(highest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        bits = tl.max(highest, 0)
    scale, inverse = _scales(bits, dither, LARGEST)
    tl.store(scales + row, scale * weight)
    for first in range(0, columns, SPAN):
        mask = first + column < columns
        value = tl.load(x + row * x_stride + first + column, mask=mask, other=0).to(tl.float32)
        tl.store(out + row * columns + first + column, (value * inverse).to(tl.float8e4nv), mask=mask)


@jit
def _part_kernel(  # type: ignore[no-untyped-def]
    x, out, scales, most, narrow, parts, rows, columns, x_stride, narrow_row, narrow_column, weight, dither,
    LARGEST: tl.constexpr, RANK: tl.constexpr, LINES: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """LINES rows, WIDTH columns of x divided by the scale, and their part of x N. Tiles that are used twice are better
    not asked for ahead: asynchronous copies take them to shared memory, from where they are read twice."""
    line, place = tl.program_id(1) * LINES + tl.arange(0, LINES), tl.arange(0, RANK)[None, :]
    there, row = (line < rows)[:, None], line.to(tl.int64)[:, None]
    scale, inverse = _scales(tl.load(most + line, mask=line < rows, other=0), dither, LARGEST)
    total = tl.zeros((LINES, RANK), dtype=tl.float32)
    begin = tl.program_id(0) * WIDTH
    for first in tl.range(begin, begin + WIDTH, SIZE, num_stages=1):
        column = first + tl.arange(0, SIZE)
        within = column < columns
        tile = tl.load(x + row * x_stride + column[None, :], mask=there & within[None, :], other=0)
        other = narrow + column.to(tl.int64)[:, None] * narrow_row + place * narrow_column
        total = tl.dot(tile, tl.load(other, mask=within[:, None], other=0), total, input_precision="ieee")
        small = (tile.to(tl.float32) * inverse[:, None]).to(tl.float8e4nv)
        tl.store(out + row * columns + column[None, :], small, mask=there & within[None, :])
    tl.store(parts + (tl.program_id(0) * rows + row) * RANK + place, total, mask=there)
    if tl.program_id(0) == 0:
        tl.store(scales + line, scale * weight, mask=line < rows)


@jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    parts, out, rows, count, RANK: tl.constexpr, BORDER: tl.constexpr, LINES: tl.constexpr
):
    """The sum of `count` parts [rows, RANK] with zeros behind it."""
    row = (tl.program_id(0) * LINES + tl.arange(0, LINES)).to(tl.int64)[:, None]
    place = tl.arange(0, BORDER)[None, :]
    total = tl.zeros((LINES, BORDER), dtype=tl.float32)
    for part in range(count):
        total += tl.load(parts + (part * rows + row) * RANK + place, mask=(row < rows) & (place < RANK), other=0)
    tl.store(out + row * BORDER + place, total.to(out.dtype.element_ty), mask=row < rows)


@dataclass
class Rounded:
    """What is multiplied in float8."""

    numbers: torch.Tensor
    """[rows, columns] in float8."""
    scales: torch.Tensor
    """What each row of a product is to be multiplied by, [rows, 1] in float32."""


def rounded(x: torch.Tensor, factor: Factor, most: torch.Tensor | None = None) -> Rounded:
    """x [rows, columns] for products with a weight of such a factor. `most`: the bits of the largest number of each
    row, [rows] in int32, if they are known."""
    rows, columns = x.shape
    if not by_triton(x):
        largest = x.abs().amax(1, keepdim=True).float()
        scales = torch.where(largest.isfinite(), power_for(largest), torch.nan) * factor.dither
        return Rounded((x / scales).to(E4M3), scales * factor.weight)
    out, scales = x.new_empty(rows, columns, dtype=E4M3), x.new_empty(rows, 1, dtype=torch.float32)
    launch(_round_kernel, (rows,),
        x, out, scales, scales if most is None else most, columns, x.stride(0), factor.weight, factor.dither,
        LARGEST=LARGEST, SPAN=min(SPAN, power_of_2(columns)), KNOWN=most is not None, num_warps=WARPS,
    )  # fmt: skip
    return Rounded(out, scales)


def rounded_beside(
    x: torch.Tensor, factor: Factor, most: torch.Tensor, narrow: torch.Tensor, border: torch.Tensor
) -> Rounded:
    """As `rounded`, by a kernel, and x N into the first columns of `border` [rows, border], with zeros behind it, for a
    `narrow` N [columns, at most WIDEST]."""
    rows, columns = x.shape
    wide, programs = narrow.shape[1], ceil_div(columns, PART["WIDTH"])
    out, scales = x.new_empty(rows, columns, dtype=E4M3), x.new_empty(rows, 1, dtype=torch.float32)
    parts = x.new_empty(programs, rows, wide, dtype=torch.float32)
    launch(_part_kernel, (programs, ceil_div(rows, PART["LINES"])),
        x, out, scales, most, narrow, parts, rows, columns, x.stride(0), *narrow.stride(), factor.weight, factor.dither,
        LARGEST=LARGEST, RANK=wide, **PART,
    )  # fmt: skip
    launch(_sum_kernel, (ceil_div(rows, LINES),),
        parts, border, rows, programs, RANK=wide, BORDER=border.shape[1], LINES=LINES,
    )  # fmt: skip
    return Rounded(out, scales)
