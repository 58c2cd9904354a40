"""Which weight of an artifact is farthest from what it should be."""

from __future__ import annotations

import math

import torch

from qft.export.job import Job
from qft.export.targets.base import Read

__all__ = ["worst_weight"]


def worst_weight(job: Job, read: Read) -> str | None:
    """Name and signal-to-noise ratio of the weight; None if all are exactly what they should be."""
    worst, noisiest = None, math.inf
    for tensors in job.weights.groups():
        for name, expected in tensors.items():
            given = read(name)
            if given is None:
                return f"{name}, which is missing"
            if given.shape != expected.shape:
                return f"{name}, which is {list(given.shape)} and not {list(expected.shape)}"
            ratio = _decibels(expected, given)
            if ratio < noisiest:
                worst, noisiest = name, ratio
    return f"{worst}, {noisiest:.1f} dB" if worst else None


def _decibels(expected: torch.Tensor, given: torch.Tensor) -> float:
    """Infinite for equal tensors."""
    signal = float(expected.double().square().sum())
    noise = float((given.double() - expected.double()).square().sum())
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
