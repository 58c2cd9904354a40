"""What quantization-aware training learns of layers beside their weights: scales, and the range of their inputs.

It is part of the model while that is trained, so that the optimizer finds it, and no part of its state dict: a file of
its own has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

NAME = "rounding_state"
"""Of the module in the model."""
KEYS = ("weight_scale", "weight_scale_change", "input_largest")
"""Of a layer, in the file: LayerState's start, change and largest."""
SMALLEST = 2**-6
"""Of what it started from, the share below which no scale falls."""


class LayerState(nn.Module):
    """Of one layer."""

    start: torch.Tensor | None
    """The scales that the first weights had, [out, groups] in float32."""
    change: nn.Parameter | None
    """What is learnt: the scales are start * (1 + change). In steps of the scales' own size, whatever that is."""
    largest: torch.Tensor | None
    """The largest magnitude [] of the inputs so far, in float32; 0: none was seen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("start", None)
        self.register_parameter("change", None)
        self.register_buffer("largest", None)
        self.observing = False

    def learn_from(self, scales: torch.Tensor) -> None:
        self.start = scales.detach().float()
        if self.change is None:
            self.change = nn.Parameter(torch.zeros_like(self.start))

    def observe_on(self, device: torch.device) -> None:
        self.largest = torch.zeros((), device=device)

    @property
    def scale(self) -> torch.Tensor | None:
        """[out, groups] in float32, if it is learnt."""
        return None if self.start is None or self.change is None else learnt_scale(self.start, self.change)

    def look(self, inputs: torch.Tensor) -> None:
        """Widen the range, if it is not frozen. What is not finite is no range: the loss tells of it."""
        if self.observing and self.largest is not None:
            seen = inputs.detach().abs().amax().float()
            torch.where(seen.isfinite() & (seen > self.largest), seen, self.largest, out=self.largest)

    def held(self) -> dict[str, torch.Tensor]:
        """By the names in the file."""
        found = zip(KEYS, (self.start, self.change, self.largest), strict=True)
        return {name: tensor.detach() for name, tensor in found if tensor is not None}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError for others than `tensors` gives."""
        if problem := self._problem(tensors):
            raise ValueError(problem)
        held = self.held()
        for name, tensor in tensors.items():
            held[name].copy_(tensor)

    def _problem(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        wanted = self.held()
        if other := sorted(wanted.keys() ^ tensors.keys()):
            return f"{other[0]} is {'missing' if other[0] in wanted else 'nothing that this quant section learns'}"
        for name, tensor in tensors.items():
            if tensor.shape != wanted[name].shape or tensor.dtype != torch.float32 or not tensor.isfinite().all():
                return f"{name} is not {list(wanted[name].shape)} finite numbers in float32"
        return None

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


class RoundingState(nn.Module):
    """Of all layers, by their names in the base."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.by_name = {name: LayerState() for name in names}
        self.layers = nn.ModuleList(self.by_name.values())

    def observe(self, on: bool) -> None:
        for state in self.by_name.values():
            state.observing = on

    def unobserved(self) -> str | None:
        """A layer whose inputs have a range, and none was seen."""
        ranges = ((name, state.largest) for name, state in self.by_name.items())
        return next((name for name, largest in ranges if largest is not None and largest == 0), None)


def learnt_scale(start: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    return start * (1 + change).clamp(min=SMALLEST)


def state_of(model: nn.Module) -> RoundingState | None:
    """Of a model whose rounding learns something."""
    found = getattr(model, NAME, None)
    return found if isinstance(found, RoundingState) else None
