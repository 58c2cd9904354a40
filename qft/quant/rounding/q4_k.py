"""llama.cpp's q4_K: blocks of 256 weights, in eight parts of 32 with 4 bits a weight, and 6 bits for the scale and for
the minimum of each part, in units of two float16 of the block (block_q4_K of ggml-common.h).

The format leaves open how scales are found. llama.cpp searches them, in float32 that its compiler orders; here they are
the extremes' own, which a training can follow from step to step and which come out alike on every device.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK, PARTS = 256, 8
MOST, MOST_OF_6_BITS = 15, 63


class Q4K(NamedTuple):
    """Blocks [..., n] of 256 weights, all in float32."""

    unit: torch.Tensor
    """Of the scales [..., n], as float16 holds it."""
    unit_of_minima: torch.Tensor
    scales: torch.Tensor
    """[..., n, 8], whole numbers to 63."""
    minima: torch.Tensor
    codes: torch.Tensor
    """[..., n, 8, 32], whole numbers to 15."""
    inside: torch.Tensor
    """Of the codes' shape, bool: where the nearest code is one of those."""

    def values(self) -> torch.Tensor:
        """[..., n * 256]. Products are exact, and so the difference is the same wherever it is computed."""
        scaled = (self.unit[..., None] * self.scales)[..., None] * self.codes
        return (scaled - (self.unit_of_minima[..., None] * self.minima)[..., None]).flatten(-3)

    def packed(self) -> NDArray[np.uint8]:
        """[..., n * 144]: the bytes of a file."""
        scales, minima, codes = (part.to(torch.uint8).numpy() for part in (self.scales, self.minima, self.codes))
        units = (
            part.half()[..., None].contiguous().numpy().view(np.uint8) for part in (self.unit, self.unit_of_minima)
        )
        first, last = slice(0, 4), slice(4, 8)
        six_bits = (
            scales[..., first] | scales[..., last] >> 4 << 6,
            minima[..., first] | minima[..., last] >> 4 << 6,
            scales[..., last] & 15 | minima[..., last] << 4,
        )
        pairs = (codes[..., 0::2, :] | codes[..., 1::2, :] << 4).reshape(*codes.shape[:-2], -1)
        blocks = np.concatenate([*units, *six_bits, pairs], axis=-1)
        return blocks.reshape(*blocks.shape[:-2], -1)


def q4_k(weight: torch.Tensor) -> Q4K:
    """Weights [..., in] in float32, of rows that are whole blocks: a part's range is from zero or its least to its
    largest."""
    parts = weight.reshape(*weight.shape[:-1], -1, PARTS, BLOCK // PARTS)
    least = parts.amin(-1).clamp(max=0)
    step = (parts.amax(-1) - least) / torch.full_like(least, MOST)
    unit, scales = _in_6_bits(step)
    unit_of_minima, minima = _in_6_bits(-least)
    scale, minimum = unit[..., None] * scales, unit_of_minima[..., None] * minima
    raised = _quotients(parts + minimum[..., None], scale[..., None]).round()
    codes = raised.clamp(0, MOST)
    return Q4K(unit, unit_of_minima, scales, minima, codes, (raised >= 0) & (raised <= MOST))


def _in_6_bits(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of values [..., n, 8] from zero on: their unit [..., n] as float16 holds it, and how often each has it."""
    largest = values.amax(-1)
    unit = (largest / torch.full_like(largest, MOST_OF_6_BITS)).half().float()
    return unit, _quotients(values, unit[..., None]).round().clamp(max=MOST_OF_6_BITS)


def _quotients(values: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Zero where the unit is: nothing can be told apart there."""
    return torch.where(unit == 0, torch.zeros_like(unit), values / unit)
