"""LLM.int8() by bitsandbytes (arXiv:2208.07339): int8 rows and columns, activation outliers in 16 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from qft.quant.grouped import Read
from qft.quant.hold.base import Scheme
from qft.quant.hold.prequantized import skipped_layers
from qft.quant.layer import LayerScheme
from qft.quant.product import Store
from qft.recipe.training import QuantSection


@dataclass(frozen=True)
class Bnb8Bit(Scheme):
    """8 bits, with one scale a row."""

    engine = "bitsandbytes"
    threshold: float = 6.0

    @classmethod
    def of(cls, quant: QuantSection, dtype: str, heads: Sequence[str]) -> Bnb8Bit:
        return cls("8bit", dtype, (*heads, *quant.named_skips), threshold=quant.threshold)

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any], dtype: str, heads: Sequence[str]) -> Bnb8Bit:
        """As a checkpoint's own quantization config has it."""
        threshold = config.get("llm_int8_threshold", 6.0)
        return cls("8bit", dtype, skipped_layers(config, heads), checkpoint=config, threshold=threshold)

    @property
    def layer(self) -> LayerScheme:
        return LayerScheme("int", 8, activations="dynamic", threshold=self.threshold)

    @property
    def above_4_bits(self) -> bool:
        return not self.checkpoint  # one that comes quantized stays as it is

    @property
    def weight_format(self) -> str:
        return "bnb-8bit"

    def short_words(self) -> str:
        return "8 bits (LLM.int8())"

    def config(self) -> dict[str, Any]:
        skipped = list(self.skipped)
        return {"load_in_8bit": True, "llm_int8_threshold": self.threshold, "llm_int8_skip_modules": skipped}

    def misfits(self, model: nn.Module) -> list[str]:
        layers = ((name, m) for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear8bitLt))
        return [name for name, layer in layers if not _fits(layer)]

    def weight_bytes(self, rows: int, columns: int) -> int:
        return rows * columns + 4 * rows

    def stack(self, weight: torch.Tensor) -> Store:
        return _Rows(weight)

    def stand_in(self, rows: int, columns: int, bias: nn.Parameter | None) -> nn.Linear:
        sizes = (columns, rows, bias is not None)
        layer = _StandIn(*sizes, has_fp16_weights=False, threshold=self.threshold, device="meta")
        layer.bias = bias
        return layer


class _Rows:
    """Weights [experts, a, b] as int8 with a float32 scale for each row of each, LLM.int8()'s. They are multiplied in
    16 bits: activations stay as they are."""

    def __init__(self, weight: torch.Tensor) -> None:
        experts, rows, columns = weight.shape
        self.shape = (experts, rows, columns)
        self.codes = torch.empty(self.shape, dtype=torch.int8, device=weight.device)
        self.scales = torch.empty(self.shape[:2], dtype=torch.float32, device=weight.device)
        if isinstance(weight, FakeTensor) or weight.is_meta:
            return
        for number, own in enumerate(each.float() for each in weight):
            self.scales[number] = own.abs().amax(dim=1)
            steps = 127 / self.scales[number].clamp(min=torch.finfo(torch.float32).tiny)
            self.codes[number] = (own * steps[:, None]).round()

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"codes": self.codes, "scales": self.scales}

    def reader(self, dtype: torch.dtype) -> Read:
        return lambda start, stop: (self.codes[start:stop] * (self.scales[start:stop, :, None] / 127)).to(dtype)


@cache
def outlier_columns(rows: int, columns: int, tokens: int, threshold: float) -> int:
    """How many columns of a layer's input [tokens, columns] hold a magnitude above `threshold`, as far as one can tell
    without the data; they are kept in 16 bits for the backward pass.

    Behind a norm next to none do (arXiv:2208.07339: at most seven). Where a gated MLP goes back to its `rows`, those do
    that silu(g)·u makes of normal inputs and weights of a standard deviation of 0.02. Tokens repeat, and so do the rows
    that they make: some thousands of them count."""
    if columns <= 2 * rows:
        return 0
    deviation = 0.02 * math.sqrt(rows)
    one, steps = NormalDist(), 100
    grid = [(step + 0.5) / steps for step in range(-8 * steps, 8 * steps)]
    gates = ((abs(deviation * z / (1 + math.exp(-deviation * z))), one.pdf(z) / steps) for z in grid)
    above = sum(2 * one.cdf(-threshold / (deviation * gate)) * weight for gate, weight in gates)
    return int(columns * (1 - (1 - above) ** min(tokens, 4096)))


class _StandIn(bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """Such a layer on tensors without contents."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x, (self.out_features, self.in_features), self.state.threshold
        )
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _Product(torch.autograd.Function):
    """x [..., columns] times a weight [rows, columns]: in int8, and for the gradient in 16 bits."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: tuple[int, int], threshold: float) -> torch.Tensor:
        flat, splits = x.reshape(-1, shape[1]) if x.dim() == 3 else x, threshold > 0
        ctx.shape, ctx.input_shape = shape, x.shape
        # As bitsandbytes does, not through save_for_backward: both live until the graph is freed.
        ctx.kept = [flat]
        if splits:
            ctx.kept.append(_empty(flat, outlier_columns(*shape, len(flat), threshold), x.dtype))
        half = flat.to(torch.float16)
        taken = [_empty(flat, shape[1], torch.int8)]
        if splits:
            magnitudes, above = half.abs(), _empty(flat, shape[1], torch.bool)
            del magnitudes, above
        del half
        taken += [_empty(flat, shape[0], torch.int32), _empty(flat, shape[0], torch.float16)]
        return taken[-1].to(x.dtype).reshape(*x.shape[:-1], shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight = torch.empty(ctx.shape, dtype=gradient.dtype)
        return torch.matmul(gradient.reshape(-1, ctx.shape[0]), weight).view(ctx.input_shape), None, None


def _empty(rows: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*rows.shape[:-1], columns, dtype=dtype)


Bnb8Bit.stand_in_class = _StandIn


def _fits(layer: Any) -> bool:
    """Whether rows and scales are those of a weight of the layer's shape."""
    weight, scales = layer.weight, getattr(layer.weight, "SCB", None)
    scales = layer.state.SCB if scales is None else scales
    rows = (layer.out_features, layer.in_features)
    return weight.dtype == torch.int8 and tuple(weight.shape) == rows and scales is not None and len(scales) == rows[0]
