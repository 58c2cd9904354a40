"""Symmetric integers with a scale for each group of a row, as `engines/rtn.py` makes them of weights and as
compressed-tensors unpacks them; and activations as it rounds them while it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from qft.quant.rounding.base import Rounded, divided


@dataclass(frozen=True)
class Integer:
    """Weights of `bits` bits."""

    bits: int
    group_size: int = -1
    """Weights of a row that share a scale; -1: all of it."""

    def __call__(self, weight: torch.Tensor, scale: torch.Tensor | None = None) -> Rounded:
        """By these scales [..., groups], which are in float32 and written in the weight's dtype, or its own."""
        groups, held = self._grouped(weight, self.scales(weight) if scale is None else scale)
        return Rounded(*(each.flatten(-2) for each in _on_grid(groups / held, held, self.bits)))

    def scales(self, weight: torch.Tensor) -> torch.Tensor:
        """[..., groups] in float32, by which each group's extremes are the ends of its range, whose positive one is a
        half too far."""
        scale = divided(self._groups(weight).abs().amax(-1), (2**self.bits - 1) / 2)
        return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)

    def codes(self, weight: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `self(weight, scale)` what a file holds: integers of the weight's shape, int8, and scales [..., groups] in
        the weight's dtype."""
        groups, held = self._grouped(weight, self.scales(weight) if scale is None else scale)
        least, most = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return (groups / held).round().clamp(least, most).to(torch.int8).flatten(-2), held[..., 0]

    def learnt(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The values of `self(weight, scale)`, with gradients of weight and scale by LSQ (arXiv:1902.08153)."""
        values: torch.Tensor = _LearnedStep.apply(weight, scale, self)  # type: ignore[no-untyped-call]
        return values

    def _groups(self, weight: torch.Tensor) -> torch.Tensor:
        size = self.group_size if self.group_size > 0 else weight.shape[-1]
        return weight.float().reshape(*weight.shape[:-1], -1, size)

    def _grouped(self, weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight [..., groups, size] in float32, and the scales [..., groups, 1] as they are written."""
        return self._groups(weight), scale.to(weight.dtype)[..., None]


class _LearnedStep(torch.autograd.Function):
    """Esser et al., arXiv:1902.08153: where the quotient v of weight and scale is within the range, the weight has the
    gradient of no rounding and the scale that of round(v) - v; elsewhere the weight has none and the scale that of the
    end of the range. The scale's is divided by the square root of its weights times the largest integer."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, scale: torch.Tensor, rounding: Integer) -> torch.Tensor:
        ctx.rounding = rounding
        ctx.save_for_backward(weight, scale)
        return rounding(weight, scale).values

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (weight, scale), rounding = ctx.saved_tensors, ctx.rounding
        least, most = -(2 ** (rounding.bits - 1)), 2 ** (rounding.bits - 1) - 1
        groups, held = rounding._grouped(weight, scale)
        none = held == 0  # which its dtype cannot hold: the value is zero, whatever weight and scale are
        quotients = (groups / held).masked_fill_(none, 0)
        inside = (quotients > least).logical_and_(quotients < most).logical_and_(~none)
        of_scale = torch.where(inside, quotients.round() - quotients, quotients.clamp(least, most))
        gradient = gradients[0].float().reshape(groups.shape)
        shrink = 1 / math.sqrt(groups.shape[-1] * most)
        return (
            (gradient * inside).reshape(weight.shape).to(weight.dtype),
            (gradient * of_scale).sum(-1).mul(shrink).to(scale.dtype),
            None,
        )


@dataclass(frozen=True)
class Scaled:
    """Weights [out, in] of `bits` bits, with scales that stay as they are."""

    bits: int
    scale: torch.Tensor
    """[out, groups], of the dtype that the values come in."""
    shift: torch.Tensor | None = None
    """[out, in], added before it is rounded. None: nothing is."""

    @classmethod
    def reaching(cls, bits: int, scale: torch.Tensor, weight: torch.Tensor, held: torch.Tensor) -> Scaled:
        """That which makes `held`, a tensor of values on the grid, of `weight`."""
        plain = cls(bits, scale)
        at = plain(weight).values != held
        return cls(bits, scale, torch.where(at, held.float() - weight.float(), 0.0)) if at.any() else plain

    def __call__(self, weight: torch.Tensor) -> Rounded:
        weight = weight.float() if self.shift is None else weight.float() + self.shift
        groups, scale = weight.reshape(*self.scale.shape, -1), self.scale[..., None]
        return Rounded(*(each.flatten(-2) for each in _on_grid(groups / scale, scale, self.bits)))


def dynamic_int8(inputs: torch.Tensor) -> Rounded:
    """Activations [batch, tokens, in] in 8 bits, each token with a scale of its own; of two dimensions, all with one.
    Quotients are in the activations' dtype, and so are scales, as transformers runs such a model."""
    dims = tuple(range(2, inputs.ndim)) or tuple(range(inputs.ndim))
    scale = divided(inputs.abs().amax(dims, keepdim=True), 127.5)
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    return Rounded(*_on_grid(inputs / scale, scale, 8))


def static_int8(inputs: torch.Tensor, largest: torch.Tensor) -> Rounded:
    """Activations in 8 bits, all with the scale of the `largest` magnitude [] in float32 that was seen before; as they
    are where none was."""
    scale = static_scale(largest, inputs.dtype)
    values, inside = _on_grid(inputs / scale, scale, 8)
    return Rounded(torch.where(largest == 0, inputs, values), inside | (largest == 0))


def static_scale(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As it is written beside a layer."""
    scale = divided(largest, 127.5)
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale).to(dtype)


def _on_grid(quotients: torch.Tensor, scale: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in the scale's dtype, and where they are inside. Uses `quotients` up: they are as large as a weight."""
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    nearest = quotients.round_()
    inside = (nearest >= least).logical_and_(nearest <= most)
    codes = nearest.clamp_(least, most).to(scale.dtype)
    # A scale that 16 bits cannot hold is zero, and what it scales with it.
    return codes.mul_(scale).masked_fill_(scale == 0, 0), inside
