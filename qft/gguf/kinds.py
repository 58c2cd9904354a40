"""Kinds of GGUF file."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["KINDS", "Kind"]


class Kind(NamedTuple):
    number: int
    """In the enum llama_ftype of llama.h, by which the file names itself."""
    bits: int
    """Of most weights, without their scales."""
    by_llamacpp: bool = False
    """Whether llama.cpp makes it of a 16-bit or 32-bit file; the others are written by `write`."""


KINDS = {
    "f32": Kind(0, 32),
    "f16": Kind(1, 16),
    "bf16": Kind(32, 16),
    "q8_0": Kind(7, 8),
    "q6_k": Kind(18, 6, by_llamacpp=True),
    "q5_k_m": Kind(17, 5, by_llamacpp=True),
    "q4_k_m": Kind(15, 4, by_llamacpp=True),
    "q4_0": Kind(2, 4),
}
