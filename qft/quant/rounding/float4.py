"""4-bit floats (e2m1: 0, 0.5, 1, 1.5, 2, 3, 4 and 6) with a scale for each block of a row, as compressed-tensors makes
them: mxfp4 (OCP Microscaling Formats v1.0) with a power of two for 32, nvfp4 with a float8 for 16."""

import torch

from qft.quant.rounding.base import Rounded, divided

MX_BLOCK, NV_BLOCK = 32, 16
MOST = 6.0
"""Largest number of e2m1; to 7 it is the nearest."""
MANTISSA = 23
"""Bits of float32's."""
FLOAT8 = torch.finfo(torch.float8_e4m3fn)


def mxfp4(weight: torch.Tensor) -> Rounded:
    """A block's largest is scaled to between 3.5 and 7, to which 6 is the nearest, so nothing is clipped. Values are in
    the weight's dtype."""
    blocks = _blocks(weight, MX_BLOCK)
    scale = _power_of_two(blocks.abs().amax(-1, keepdim=True))
    nearest = _e2m1((blocks / scale).abs_())
    return Rounded(nearest.mul_(scale).copysign_(blocks).flatten(-2).to(weight.dtype), None)


def nvfp4(weight: torch.Tensor, largest: torch.Tensor | None = None) -> Rounded:
    """A block's scale is a float8 (e4m3), and a float32 scale of the whole tensor makes these fill their range: by its
    largest magnitude, or by that of all tensors that share it (`largest` []). What is not finite makes all
    of the tensor so. Values are in the weight's dtype, and bfloat16 holds them all."""
    blocks = _blocks(weight, NV_BLOCK)
    tops = blocks.abs().amax(-1, keepdim=True)
    whole = global_scale(tops.amax() if largest is None else largest)
    scale = (whole * divided(tops, MOST)).clamp(FLOAT8.min, FLOAT8.max).to(torch.float8_e4m3fn).float()
    scale = torch.where(scale == 0, FLOAT8.eps, scale) / whole
    quotients = blocks / scale
    nearest = _e2m1(quotients.abs().clamp_(max=MOST)).copysign_(quotients)
    values = nearest.mul_(scale).bfloat16().flatten(-2).to(weight.dtype)
    # Only scales next to the least that float8 holds are so rough that something is clipped.
    return Rounded(values, (quotients.abs_() < MOST + 1).flatten(-2))


def global_scale(largest: torch.Tensor) -> torch.Tensor:
    """What scales of blocks are multiplied with, in float32: the block of the largest magnitude has float8's largest.
    1 where float32 has none, as for a tensor of zeros."""
    # As torch divides a number by a tensor.
    scale = largest.clamp(min=torch.finfo(torch.float32).tiny).reciprocal() * (FLOAT8.max * MOST)
    return scale.nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)


def _blocks(weight: torch.Tensor, size: int) -> torch.Tensor:
    return weight.float().reshape(*weight.shape[:-1], -1, size)


def _e2m1(size: torch.Tensor) -> torch.Tensor:
    """The nearest of magnitudes below 7; a half to the even one. Steps between neighbours: a half below 2, 1 below 4, 2
    above."""
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (size / step).round_().mul_(step)


def _power_of_two(largest: torch.Tensor) -> torch.Tensor:
    """2 ** (exponent - 2), with the exponent of the next power of two for what is above 1.75 of its own."""
    bits = largest.contiguous().view(torch.int32)
    exponent = ((bits + (1 << (MANTISSA - 2))) >> MANTISSA).sub(2).clamp(0)
    return torch.where(exponent == 0, 1 << (MANTISSA - 1), exponent << MANTISSA).to(torch.int32).view(torch.float32)
