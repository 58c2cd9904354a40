"""Weights as they are: float32, bfloat16 or float16, by model.dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from qft.quant.hold.base import Scheme
from qft.recipe.training import QuantSection


class Unquantized(Scheme):
    """Nothing is quantized."""

    keeps_weights = True

    @classmethod
    def of(cls, quant: QuantSection, dtype: str, heads: Sequence[str]) -> Unquantized:
        return cls("none", dtype)

    @property
    def above_4_bits(self) -> bool:
        return True

    @property
    def weight_format(self) -> str:
        return "16-bit"

    def quantizes(self, layer: str) -> bool:
        return False

    def holds(self, model: PreTrainedModel) -> set[str]:
        return set()

    def weight_bytes(self, rows: int, columns: int) -> int:
        return rows * columns * int(getattr(torch, self.dtype).itemsize)

    def short_words(self) -> str:
        return self.dtype
