"""LLM.int8() by bitsandbytes (arXiv:2208.07339): int8 rows and columns, activation outliers in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qft.quant.hold.base import Scheme
from qft.quant.hold.prequantized import skipped_layers
from qft.quant.layer import LayerScheme
from qft.recipe.training import QuantSection


@dataclass(frozen=True)
class Bnb8Bit(Scheme):
    """8 bits, with one scale a row."""

    engine = "bitsandbytes"
    threshold: float = 6.0

    @classmethod
    def of(cls, quant: QuantSection, dtype: str, heads: Sequence[str]) -> Bnb8Bit:
        return cls("8bit", dtype, (*heads, *quant.named_skips), threshold=quant.threshold)

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any], dtype: str) -> Bnb8Bit:
        """As a checkpoint's own quantization config has it."""
        threshold = config.get("llm_int8_threshold", 6.0)
        return cls("8bit", dtype, skipped_layers(config), checkpoint=config, threshold=threshold)

    @property
    def layer(self) -> LayerScheme:
        return LayerScheme("int", 8, activations="dynamic", threshold=self.threshold)

    @property
    def above_4_bits(self) -> bool:
        return not self.checkpoint  # one that comes quantized stays as it is

    @property
    def weight_format(self) -> str:
        return "bnb-8bit"

    def short_words(self) -> str:
        return "8 bits (LLM.int8())"

    def config(self) -> dict[str, Any]:
        skipped = list(self.skipped)
        return {"load_in_8bit": True, "llm_int8_threshold": self.threshold, "llm_int8_skip_modules": skipped}

    def weight_bytes(self, rows: int, columns: int) -> int:
        return rows * columns + 4 * rows
