"""LLM.int8() by bitsandbytes (arXiv:2208.07339): int8 rows and columns, activation outliers in 16 bits."""

from __future__ import annotations

from typing import Any

from torch import nn

from qft.recipe.schema import QuantSection

__all__ = ["Bnb8Bit"]


class Bnb8Bit:
    def config(self, quant: QuantSection, compute_dtype: str, heads: list[str]) -> dict[str, Any]:
        return {
            "load_in_8bit": True,
            "llm_int8_threshold": quant.threshold,
            "llm_int8_skip_modules": [*heads, *quant.skip_modules],
        }

    def after_load(self, model: nn.Module) -> None:
        pass
