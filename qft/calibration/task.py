"""What the quantization of a model's blocks is asked to do, and nothing of who asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qft.quant.engines import LayerScheme

__all__ = ["QuantizeTask", "Schemes"]

Schemes = Mapping[str, LayerScheme | None]
"""Of every linear layer, by its name; None: left in 16 bits."""


@dataclass(frozen=True)
class QuantizeTask:
    """The blocks of one model, quantized by one engine."""

    engine: str
    schemes: Schemes
    rows: Sequence[Mapping[str, Any]]
    """Held-out rows that tell what it does to the model: input_ids and labels."""
    windows: Sequence[Sequence[int]] = ()
    """Token ids that the engine looks at."""
    iters: int = 0
    """Steps of the engine's tuning for each block."""
    seed: int = 0
    remedy: bool = False
    """Whether the worst layers are held in more bits, as long as what was tried is not accepted."""
    max_bytes: int | None = None
    """Largest result of the remedy, in bytes of weights."""
