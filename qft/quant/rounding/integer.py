"""Symmetric integers with a scale for each group of a row, as `engines/rtn.py` makes them of weights and as
compressed-tensors unpacks them; and activations as it rounds them while it runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qft.quant.rounding.base import Rounded, divided


@dataclass(frozen=True)
class Integer:
    """Weights of `bits` bits; each group's extremes are the ends of its range, whose positive one is a half too far."""

    bits: int
    group_size: int = -1
    """Weights of a row that share a scale; -1: all of it."""

    def __call__(self, weight: torch.Tensor) -> Rounded:
        size = self.group_size if self.group_size > 0 else weight.shape[-1]
        groups = weight.float().reshape(*weight.shape[:-1], -1, size)
        largest = groups.abs().amax(-1, keepdim=True)
        scale = divided(largest, (2**self.bits - 1) / 2)
        scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale).to(weight.dtype)
        return Rounded(*(each.flatten(-2) for each in _on_grid(groups / scale, scale, self.bits)))


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


def _on_grid(quotients: torch.Tensor, scale: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in the scale's dtype, and where they are inside."""
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    nearest = quotients.round()
    codes = nearest.clamp(least, most).to(scale.dtype)
    # A scale that 16 bits cannot hold is zero, and what it scales with it.
    values = torch.where(scale == 0, torch.zeros_like(scale), codes * scale)
    return values, (nearest >= least) & (nearest <= most)
