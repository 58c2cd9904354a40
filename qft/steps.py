"""What is measured of one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Step"]


@dataclass(frozen=True)
class Step:
    """One optimizer step, as measured."""

    step: int
    loss: float
    """Mean over the supervised tokens; NaN where the step was skipped for it."""
    learning_rate: float
    grad_norm: float
    """Norm before clipping."""
    tokens: int
    """Tokens that are not padding."""
    padded_tokens: int
    """Tokens with padding."""
    supervised_tokens: int
    rows: int
    seconds: float
    """From taking the batch to the end of the update."""
    memory: int
    """Bytes in use after the step: of the GPU, or of this process on a CPU."""
    peak_memory: int
    skipped: bool = False
