"""Which weight of a merged artifact is farthest from what it should be."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import safe_open

from qft.export.base import Job
from qft.export.weights import MergedWeights
from qft.models import tensors_in

__all__ = ["worst_weight"]


def worst_weight(job: Job, folder: Path) -> str | None:
    """Name and signal-to-noise ratio of the weight; None if all are exactly what they should be."""
    found = tensors_in(folder.glob("*.safetensors"))
    worst, noisiest = None, math.inf
    for tensors in MergedWeights(job).groups():
        for name, expected in tensors.items():
            if name not in found:
                return f"{name}, which is missing"
            with safe_open(found[name], framework="pt") as file:
                given = file.get_tensor(name)
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
