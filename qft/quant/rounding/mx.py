"""4-bit floats with a power of two for 32 weights (OCP Microscaling Formats v1.0), as compressed-tensors makes them."""

import torch

from qft.quant.rounding.base import Rounded

BLOCK = 32
MANTISSA = 23
"""Bits of float32's."""


def mxfp4(weight: torch.Tensor) -> Rounded:
    """e2m1: 0, 0.5, 1, 1.5, 2, 3, 4 and 6, a half to the even one. A block's largest is scaled to between 3.5 and 7, to
    which 6 is the nearest, so nothing is clipped. Values are in the weight's dtype."""
    blocks = weight.float().reshape(*weight.shape[:-1], -1, BLOCK)
    scale = _scale(blocks.abs().amax(-1, keepdim=True))
    size = (blocks / scale).abs()
    # Steps between neighbours: a half below 2, 1 below 4, 2 above.
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    nearest = (size / step).round() * step
    return Rounded((nearest * scale).copysign(blocks).flatten(-2).to(weight.dtype), None)


def _scale(largest: torch.Tensor) -> torch.Tensor:
    """2 ** (exponent - 2), with the exponent of the next power of two for what is above 1.75 of its own."""
    bits = largest.contiguous().view(torch.int32)
    exponent = ((bits + (1 << (MANTISSA - 2))) >> MANTISSA).sub(2).clamp(0)
    return torch.where(exponent == 0, 1 << (MANTISSA - 1), exponent << MANTISSA).to(torch.int32).view(torch.float32)
