"""Rotary embeddings whose frequencies are scaled."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def llama3_factors(rope: Mapping[str, Any], size: int) -> NDArray[np.float32]:
    """What Llama 3.1's rule divides the frequencies of heads of `size` numbers by, float32 [size / 2]: long waves are
    slowed by `factor`, short ones not at all, those between in proportion."""
    pairs = np.arange(0, size, 2, dtype=np.float64) / size
    wavelength = 2 * math.pi * rope["rope_theta"] ** pairs
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = (rope["original_max_position_embeddings"] / wavelength - low) / (high - low)
    kept = np.clip(share, 0.0, 1.0)
    factors: NDArray[np.float32] = (1.0 / (kept + (1.0 - kept) / rope["factor"])).astype(np.float32)
    return factors
