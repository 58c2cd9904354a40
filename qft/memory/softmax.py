"""Cross-entropy whose gradient takes the place of the logits: nothing beside them is held.

A head's outputs z become logits by a Tail, cap · tanh(scale · z / cap), or scale · z. Sums are in float32 (float64 of
float64), whatever z is; the true class's share is subtracted before anything is rounded to 16 bits.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

Gradient = Callable[[torch.Tensor, torch.Tensor, "Tail"], torch.Tensor]
"""From z [rows, vocabulary], which become the gradient of the sum of the losses with respect to themselves, the true
classes, int64 [rows], and the tail, to the losses in nats [rows]."""

WIDE = 2**22
"""Bytes that logits may take at once that are copied to float32."""


@dataclass(frozen=True)
class Tail:
    """What a model does to its head's outputs."""

    scale: float = 1.0
    cap: float | None = None
    """Soft cap; None: there is none."""

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """Logits."""
        scaled = z if self.scale == 1 else z * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)


def gradient_in_torch(z: torch.Tensor, classes: torch.Tensor, tail: Tail) -> torch.Tensor:
    """A Gradient for any device; few rows at a time are copied to float32: sums over them take as much again."""
    rows = max(WIDE // (4 * z.shape[1]), 1)
    parts = zip(torch.split(z, rows), torch.split(classes, rows), strict=True)
    return torch.cat([_of_rows(*part, tail) for part in parts])


def _of_rows(z: torch.Tensor, classes: torch.Tensor, tail: Tail) -> torch.Tensor:
    wide = z if z.dtype in (torch.float32, torch.float64) else z.float()
    logits, at = tail(wide), classes[:, None]
    sums = logits.logsumexp(-1, keepdim=True)
    losses = (sums - logits.gather(1, at)).squeeze(1)
    slope = None if tail.cap is None else (1 - (logits / tail.cap) ** 2) * tail.scale
    share = logits.sub_(sums).exp_()
    share.scatter_add_(1, at, torch.full_like(sums, -1))
    if slope is not None or tail.scale != 1:
        share *= tail.scale if slope is None else slope
    if share is not z:
        z.copy_(share)
    return losses


def gradient_in_place(z: torch.Tensor, classes: torch.Tensor, tail: Tail) -> torch.Tensor:
    """A Gradient, by one kernel on a GPU."""
    on_gpu = z.is_cuda and z.dtype != torch.float64 and _has_kernel()
    if not on_gpu:
        return gradient_in_torch(z, classes, tail)
    from qft.memory.softmax_kernel import gradient_by_kernel

    return gradient_by_kernel(z, classes, tail.scale, tail.cap)


@functools.cache
def _has_kernel() -> bool:
    return importlib.util.find_spec("triton") is not None
