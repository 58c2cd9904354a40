"""Weights as they are: float32, bfloat16 or float16, by model.dtype."""

from __future__ import annotations

from typing import Any

from torch import nn

from qft.recipe.schema import QuantSection

__all__ = ["Unquantized"]


class Unquantized:
    def config(self, quant: QuantSection, compute_dtype: str, heads: list[str]) -> dict[str, Any]:
        return {}

    def after_load(self, model: nn.Module) -> None:
        pass
