"""Weights that stay in few bits as their files have them, and are made whenever they are multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qft.checkpoint.weights import PackedWeight
from qft.quant.grouped import Read
from qft.quant.product import View
from qft.quant.stacked import Stacked


class Held:
    """Weights [experts, a, b], or one, [1, a, b]."""

    def __init__(self, weight: PackedWeight, model: Any, shape: torch.Size, device: str) -> None:
        self.weight, self.model, self.ndim = weight, model, len(shape)
        experts, rows, columns = shape if len(shape) == 3 else (1, *shape)
        self.shape = (experts, rows, columns)
        self.places = {f"{what}_{number}": (name, what)
                       for number, (name, parts) in enumerate(weight.parts.items()) for what in parts}  # fmt: skip
        for attribute, (name, what) in self.places.items():
            setattr(self, attribute, weight.parts[name][what].to(device))
        self.weight = replace(weight, parts={})

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {attribute: getattr(self, attribute) for attribute in self.places}

    def reader(self, dtype: torch.dtype) -> Read:
        return lambda start, stop: self._made(start, stop).to(dtype)

    def _made(self, start: int, stop: int) -> torch.Tensor:
        group, whole = self.weight.group, self.ndim == 2
        patterns = dict.fromkeys(pattern for pattern, _ in group.parts)
        chosen = {pattern: [name for own, name in group.parts if own == pattern] for pattern in patterns}
        one = all(len(names) == 1 for names in chosen.values())  # all experts are one tensor

        def load(name: str) -> torch.Tensor:
            parts = {what: getattr(self, attribute) for attribute, (own, what) in self.places.items() if own == name}
            return self.weight.values[name](parts if whole or not one else {w: p[start:stop] for w, p in parts.items()})

        names = chosen if whole or one else {pattern: each[start:stop] for pattern, each in chosen.items()}
        parts = [(pattern, name) for pattern, own in names.items() for name in own]
        made = replace(group, parts=parts).made(load, self.model)[group.target]
        return made[None] if whole else made


def held(weight: PackedWeight, model: Any, meta: torch.Tensor, place: tuple[str, torch.dtype]) -> nn.Parameter:
    """The parameter of `model` that stands for it, of the shape of `meta`, on a device and called of a dtype."""
    view = View(Held(weight, model, meta.shape, place[0]), place[1], chosen=0 if meta.ndim == 2 else None)
    return nn.Parameter(Stacked(view), requires_grad=False)
