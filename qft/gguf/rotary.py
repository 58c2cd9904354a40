"""The order of rows that llama.cpp's rotary embedding wants, and the way back."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

__all__ = ["deinterleave", "heads_to_interleave", "interleave"]


def heads_to_interleave(name: str, config: Any, arch: gguf.MODEL_ARCH) -> int:
    """Heads of a projection whose rows are to be reordered, 0 for none."""
    if arch != gguf.MODEL_ARCH.LLAMA:
        return 0
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in name else 0


def interleave(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the rows [heads * head_dim, ...] of q or k so that each rotated pair lies side by side.

    Hugging Face's Llama rotates row i of a head with row i + head_dim / 2; llama.cpp's rotates rows 2i and 2i + 1.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows.shape)


def deinterleave(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """What `interleave` was given."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(rows.shape)
