"""Rows of activations and gradients in float8 (e4m3), each with a scale."""

# Triton reads annotations, which must be no strings.

from dataclasses import dataclass

import torch

from qft.kernels.float8 import E4M3, LARGEST, Factor, power_for
from qft.kernels.jit import by_triton, jit, launch, power_of_2, tl

SPAN, WARPS = 4096, 8
"""Columns of a row at once, and by how many warps."""


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
    exponent = bits >> 23
    power = tl.maximum(exponent - LARGEST, 1)
    inverse = ((254 - power) << 23).to(tl.float32, bitcast=True) / dither
    scale = tl.where(exponent == 255, 0x7FC00000, power << 23).to(tl.float32, bitcast=True)
    tl.store(scales + row, scale * dither * weight)
    for first in range(0, columns, SPAN):
        mask = first + column < columns
        value = tl.load(x + row * x_stride + first + column, mask=mask, other=0).to(tl.float32)
        tl.store(out + row * columns + first + column, (value * inverse).to(tl.float8e4nv), mask=mask)


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
