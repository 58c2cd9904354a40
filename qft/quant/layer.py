"""How one linear layer is held, whoever quantizes it and whichever way it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qft.recipe.catalogue import SCHEME_FIELDS

__all__ = ["LayerScheme"]


@dataclass(frozen=True)
class LayerScheme:
    """How one linear layer is held."""

    data_type: str
    """int, float, nf4 or fp4."""
    bits: int
    group_size: int = -1
    """Weights of a row that share a scale; -1: all of it."""
    symmetric: bool = True
    activations: str = "none"
    """none, dynamic or static."""
    double_quant: bool = True
    """Of nf4 and fp4: whether the scales are quantized too."""
    threshold: float = 6.0
    """Of LLM.int8(): the magnitude of an activation from which on its column is multiplied in 16 bits, the paper's."""

    def facts(self) -> dict[str, Any]:
        """As plain values, by the names of the fields of `calibrate`."""
        return {name: getattr(self, name) for name in SCHEME_FIELDS}
