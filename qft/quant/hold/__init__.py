"""Ways to hold the base's weights, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qft.quant.hold.base import Scheme
from qft.quant.hold.bnb_4bit import Bnb4Bit
from qft.quant.hold.bnb_8bit import Bnb8Bit
from qft.quant.hold.custom import Custom
from qft.quant.hold.none import Unquantized
from qft.quant.hold.prequantized import Prequantized, contradictions
from qft.recipe.training import QuantSection

__all__ = ["SCHEMES", "Scheme", "contradictions", "find_scheme"]

SCHEMES: dict[str, Callable[[QuantSection, str, Sequence[str]], Scheme]] = {
    "none": Unquantized.of,
    "8bit": Bnb8Bit.of,
    "4bit": Bnb4Bit.of,
    "custom": Custom.of,
}
"""By quant.mode: of the section, the dtype of what is not quantized, and the names of the output heads."""


def find_scheme(quant: QuantSection, quantization: Mapping[str, Any], dtype: str, heads: Sequence[str]) -> Scheme:
    """How a model is held; `quantization` is the configuration of a checkpoint that comes quantized, else empty."""
    if quantization:
        return Prequantized.of(quantization, quant, dtype)
    return SCHEMES[quant.mode](quant, dtype, heads)
