"""A checkpoint that comes quantized, held as its files have it: dequantized whenever it is multiplied."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qft.quant.experts import expert_parameters
from qft.quant.grouped import Read
from qft.quant.hold.base import Scheme
from qft.quant.hold.prequantized import packed_problems, skipped_layers
from qft.quant.product import Store, View
from qft.quant.stacked import Stacked
from qft.recipe import Recipe
from qft.recipe.section import Problem


@dataclass(frozen=True)
class AsPacked(Scheme):
    """By the layout of the checkpoint's own method."""

    weights: Collection[str] = field(default_factory=frozenset)
    """Those in few bits, by their names in the model."""
    bits: float = 0.0
    """That one takes, scales included, on the average."""

    @classmethod
    def of(
        cls, name: str, checkpoint: Mapping[str, Any], dtype: str, weights: Collection[str], bits: float
    ) -> AsPacked:
        return cls(name, dtype, skipped_layers(checkpoint), None, checkpoint, weights, bits)

    def short_words(self) -> str:
        return f"{self.name} ({self.bits:.1f} bits)"

    def details(self) -> list[str]:
        return [f"{self.name} as in its files, {self.bits:.1f} bits a weight", f"computed in {self.dtype}"]

    def problems(self, recipe: Recipe) -> Iterator[Problem]:
        return packed_problems(self.checkpoint, recipe)

    def quantizes(self, layer: str) -> bool:
        return f"{layer}.weight" in self.weights

    def holds(self, model: PreTrainedModel) -> set[str]:
        return {name for name, _ in model.named_modules() if f"{name}.weight" in self.weights}

    def holds_experts(self, model: PreTrainedModel) -> set[str]:
        return {name for name in expert_parameters(model) if name in self.weights}

    def weight_bytes(self, rows: int, columns: int) -> int:
        return int(rows * columns * self.bits / 8)

    def stack(self, weight: torch.Tensor) -> Store:
        """Without contents: what is in the files is not made of weights."""
        return _Foreseen(weight, self.bits)

    def stand_in(self, rows: int, columns: int, bias: nn.Parameter | None) -> nn.Linear:
        layer: Any = nn.Linear(columns, rows, bias=False, device="meta")
        weight = torch.empty(1, rows, columns, dtype=getattr(torch, self.dtype), device="meta")
        layer.weight = nn.Parameter(Stacked(View(self.stack(weight), weight.dtype, chosen=0)), requires_grad=False)
        layer.bias = bias
        made: nn.Linear = layer
        return made


class _Foreseen:
    """What stands for such weights [experts, a, b] where there are none."""

    def __init__(self, weight: torch.Tensor, bits: float) -> None:
        experts, rows, columns = weight.shape
        self.shape = (experts, rows, columns)
        self.packed = torch.empty(int(weight.numel() * bits / 8), dtype=torch.uint8, device=weight.device)

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"packed": self.packed}

    def reader(self, dtype: torch.dtype) -> Read:
        def read(start: int, stop: int) -> torch.Tensor:
            wide = [torch.empty(stop - start, *self.shape[1:], device=self.packed.device) for _ in range(3)]
            made = torch.empty_like(wide[0], dtype=dtype)
            del wide
            return made

        return read
