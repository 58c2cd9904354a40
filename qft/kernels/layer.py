"""A linear layer with its LoRA as one matrix: [[W, B], [A, 0]], made anew in shared memory for each product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from qft.kernels import borders, float8
from qft.kernels.buffers import SCRATCH, border_for
from qft.kernels.dequantize import Held, alike, dequantize_into, fits


@dataclass
class Layer:
    """What is multiplied with: a frozen weight [out, in], and A [r, in] and B [out, r] of its adapter if it has one."""

    module: nn.Module
    """Of the model: peft's, or the linear layer itself."""
    base: Any
    adapter: str | None
    scaling: float
    rank: int
    given: torch.dtype | None = None
    made: torch.dtype | None = None
    """Of its input and its output, where they are other than what it multiplies in: a layer norm gives float32 under
    autocast, and bitsandbytes makes of each input one of the same dtype."""

    @property
    def rows(self) -> int:
        rows: int = self.base.out_features
        return rows

    @property
    def columns(self) -> int:
        columns: int = self.base.in_features
        return columns

    @property
    def pair(self) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """A and B."""
        if self.adapter is None:
            return None, None
        a, b = self._factors
        return a.weight, b.weight

    @cached_property
    def _factors(self) -> tuple[Any, Any]:
        """The layers of A and B: on the way through the adapter's modules, the host would take as long as for a
        launch."""
        module: Any = self.module
        return module.lora_A[self.adapter], module.lora_B[self.adapter]

    @property
    def bias(self) -> torch.Tensor | None:
        bias: torch.Tensor | None = self.base.bias
        return bias

    @property
    def held(self) -> Held:
        """Its frozen weight."""
        weight = self.base.weight
        return weight, getattr(weight, "quant_state", None)

    @property
    def dtype(self) -> torch.dtype:
        """In which it multiplies."""
        held = isinstance(self.base, bnb.nn.Linear4bit)
        dtype: torch.dtype = self.base.compute_dtype if held else self.base.weight.dtype
        return dtype

    def is_as_found(self) -> bool:
        """Whether the adapter is still the one that is put on, alone, and not merged."""
        module: Any = self.module
        if self.adapter is None:
            return True
        return not module.disable_adapters and not module.merged_adapters and module.active_adapters == [self.adapter]


HALF = (torch.bfloat16, torch.float16)


def layer_of(module: nn.Module) -> Layer | str:
    """A module as a Layer, or why it is none that can be fused."""
    base: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
    kind = type(base)
    stands_in = getattr(kind, "stands_in", False)
    if not stands_in and kind not in (nn.Linear, bnb.nn.Linear4bit, bnb.nn.LinearNF4, bnb.nn.LinearFP4):
        return f"{kind.__name__} is computed by its own code"
    parameters = [base.weight] if base.bias is None else [base.weight, base.bias]
    if any(parameter.requires_grad for parameter in parameters):
        return "its own weights or bias are trained"
    if any(part._forward_hooks or part._forward_pre_hooks or nn.utils.parametrize.is_parametrized(part)
           for part in module.modules()):  # fmt: skip
        return "others watch or change its parts"
    state = getattr(base.weight, "quant_state", None)
    if kind is not nn.Linear and not stands_in and (state is None or not fits(state, base.in_features)):
        return "its blocks of 4-bit codes do not end with its rows"
    found = _adapted(module, base) if isinstance(module, LoraLayer) else Layer(module, base, None, 1.0, 0)
    if isinstance(found, Layer) and found.dtype not in HALF:
        return f"it multiplies in {str(found.dtype).removeprefix('torch.')}"
    return found


def _adapted(module: Any, base: nn.Module) -> Layer | str:
    active = module.active_adapters
    if len(active) != 1 or active[0] not in module.lora_A or len(module.lora_A) != 1:
        return "it has not one adapter"
    name = active[0]
    if module.lora_variant or module.lora_bias.get(name):
        return "its adapter is more than A and B"
    if not isinstance(module.lora_dropout[name], nn.Identity):
        return "its adapter has dropout"
    if module.merged or module.disable_adapters:
        return "its adapter is merged or off"
    a, b = module.lora_A[name], module.lora_B[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        return "its adapter is not of two linear layers"
    if not (a.weight.requires_grad and b.weight.requires_grad):
        return "its adapter is not trained"
    return Layer(module, base, name, float(module.scaling[name]), a.weight.shape[0])


@dataclass
class Matrix:
    """What a product is taken with."""

    weight: torch.Tensor
    """[rows + border, columns + border]: W, B behind it and A below it. In float8 W alone, [rows, columns], or on the
    way back [columns, rows]."""
    right: torch.Tensor
    """B, [rows, border]."""
    below: torch.Tensor
    """A, [border, columns]."""
    factor: float8.Factor | None = None
    """Of scales, for a weight in float8."""


class Stack:
    """Layers of the same input, whose matrices lie one above the other, each with its own columns of the border."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = list(layers)
        self.rows, self.columns, self.dtype = sum(x.rows for x in layers), layers[0].columns, layers[0].dtype
        self.given, self.made = layers[0].given or self.dtype, layers[0].made or self.dtype
        self.has_bias = any(x.bias is not None for x in layers)
        self.rank = sum(x.rank for x in layers)
        self.border = border_for(max(self.rank + self.has_bias, 1))
        starts, offsets = [0], [0]
        for layer in layers:
            starts.append(starts[-1] + layer.rows)
            offsets.append(offsets[-1] + layer.rank)
        self.row_parts = [slice(a, b) for a, b in pairwise(starts)]
        self.rank_parts = [slice(a, b) for a, b in pairwise(offsets)]
        self.float8, self.both_ways = False, False
        """Whether frozen products are, on the way back, and on the way forward, too, if outputs lie side by side."""
        self.dither: Callable[[int], float] = lambda part: 1.0
        """What scales in float8 are multiplied with: of the weights (0), of inputs (1) and of gradients (2)."""
        self.lacking: float8.Added | None = None
        """What the outputs side by side lack that were made last."""
        self.expect()

    def expect(self) -> None:
        """Say what memory will be asked for."""
        border = 0 if self.forward_in_float8 else self.border
        SCRATCH.expect(self.rows + border, self.columns + border)

    @property
    def forward_in_float8(self) -> bool:
        return self.float8 and self.both_ways

    @property
    def pairs(self) -> list[torch.Tensor | None]:
        """A and B of each layer."""
        return [tensor for layer in self.layers for tensor in layer.pair]

    def matrix(self, device: torch.device, *, forward: bool, in_float8: bool = False) -> Matrix:
        """In memory that the next one takes; A is scaled on the way forward, B on the way back. Forward, the column
        behind the ranks is the bias."""
        # bitsandbytes' weights answer each question by way of Python, some twenty times as slowly as tensors do
        with torch._C.DisableTorchFunctionSubclass():
            made = self._in_float8(device, turned=not forward) if in_float8 else self._in_half(device)
            borders.write(made.right, made.below, self, forward=forward)
        return made

    def _in_half(self, device: torch.device) -> Matrix:
        shape = (self.rows + self.border, self.columns + self.border)
        whole, is_there = SCRATCH.matrix(*shape, device, self.dtype, self)
        if not (is_there or isinstance(whole, FakeTensor)):
            for weights, part in self._at_once():
                dequantize_into(weights, whole[part, : self.columns])
        return Matrix(whole, whole[: self.rows, self.columns :], whole[self.rows :, : self.columns])

    def _in_float8(self, device: torch.device, *, turned: bool) -> Matrix:
        shape = (self.columns, self.rows) if turned else (self.rows, self.columns)
        weight, _ = SCRATCH.matrix(*shape, device, float8.E4M3, self)
        factor = float8.Factor()
        if not isinstance(weight, FakeTensor):
            factor = float8.Factor(self.scale * self.dither(0), self.dither(2 if turned else 1))
            for weights, part in self._at_once():
                float8.write(weights, weight[:, part] if turned else weight[part], factor.weight, turned=turned)
        right, below = self._borders(device)
        return Matrix(weight, right, below, factor)

    def _borders(self, device: torch.device) -> list[torch.Tensor]:
        """Places of B and A [rows, border] and [border, columns], of their own."""
        shapes = (self.rows, self.border), (self.border, self.columns)
        return [torch.empty(shape, dtype=self.dtype, device=device) for shape in shapes]

    def added(self, border: torch.Tensor, right: torch.Tensor | None = None) -> float8.Added:
        """What adapters and biases add to the outputs side by side, for a border [rows, border] behind x and B [rows of
        all, border], which is written anew if it is not given."""
        if right is None:
            right, below = self._borders(border.device)
            borders.write(right, below, self, forward=True)
        return float8.Added(border, right.t(), self.rank + self.has_bias, self._half)

    @cached_property
    def _half(self) -> int:
        """The rank of both layers, if there are two and kernels can take the columns of each alone; else 0."""
        rank = self.layers[0].rank
        alone = len(self.layers) == 2 and self.layers[1].rank == rank and not self.has_bias
        return rank if alone and rank + float8.taken(rank) <= self.border else 0

    def _at_once(self) -> list[tuple[list[Held], slice]]:
        """The weights that one kernel writes, and their rows."""
        weights = [layer.held for layer in self.layers]
        if self._are_alike:
            return [(weights, slice(0, self.rows))]
        return [([weight], part) for weight, part in zip(weights, self.row_parts, strict=True)]

    @cached_property
    def _are_alike(self) -> bool:
        return alike([layer.held for layer in self.layers])

    @cached_property
    def scale(self) -> float:
        """Of the weights in float8."""
        weights = [layer.held for layer in self.layers]
        return float(float8.power_for(torch.stack([float8.largest(*each).float() for each in weights]).amax()))

    def why_not_float8(self) -> str | None:
        """Why its frozen products cannot be in float8; None: they can."""
        if self.dtype not in float8.SUMMED_TO:
            return f"float8 is for what multiplies in bfloat16, not {str(self.dtype).removeprefix('torch.')}"
        if any(size % float8.MULTIPLE for layer in self.layers for size in (layer.rows, layer.columns)):
            return f"float8 is for rows and columns that are multiples of {float8.MULTIPLE}"
        return None

    def is_as_found(self) -> bool:
        return all(layer.is_as_found() for layer in self.layers)
