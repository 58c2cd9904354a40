"""LLM.int8() by bitsandbytes (arXiv:2208.07339): int8 rows and columns, activation outliers in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

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

    def misfits(self, model: nn.Module) -> list[str]:
        layers = ((name, m) for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear8bitLt))
        return [name for name, layer in layers if not _fits(layer)]

    def weight_bytes(self, rows: int, columns: int) -> int:
        return rows * columns + 4 * rows


def _fits(layer: Any) -> bool:
    """Whether rows and scales are those of a weight of the layer's shape."""
    weight, scales = layer.weight, getattr(layer.weight, "SCB", None)
    scales = layer.state.SCB if scales is None else scales
    rows = (layer.out_features, layer.in_features)
    return weight.dtype == torch.int8 and tuple(weight.shape) == rows and scales is not None and len(scales) == rows[0]
