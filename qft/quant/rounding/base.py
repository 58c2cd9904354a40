"""What a format makes of a weight, and how gradients pass it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch


class Rounded(NamedTuple):
    """A weight as a file of the format gives it back."""

    values: torch.Tensor
    """Of the weight's shape, in the dtype in which the format dequantizes."""
    inside: torch.Tensor | None
    """Of the same shape, bool: where the nearest value of the grid lies within its range. None: everywhere."""


Rounding = Callable[[torch.Tensor], Rounded]
"""A floating point tensor [..., in], of rows that are whole blocks, rounded on its device. What is not finite makes its
block not finite, so that the loss tells; so does what the format's scales cannot hold."""


def largest_of(weight: torch.Tensor) -> torch.Tensor:
    """The largest magnitude [], in float32."""
    return weight.detach().float().abs().amax()


def sharing(rounding: Callable[..., Rounded], largest: Sequence[torch.Tensor]) -> Rounding:
    """Of one that takes the largest magnitude of several tensors besides: with that of these, `largest_of` each."""
    return partial(rounding, largest=torch.stack(list(largest)).amax())


def with_scale(rounding: Callable[..., Rounded], scale: torch.Tensor) -> Rounding:
    """Of one that takes scales besides: with these."""
    return partial(rounding, scale=scale)


def divided(values: torch.Tensor, divisor: float) -> torch.Tensor:
    """The quotients, rounded once: by a Python number, a GPU would multiply with its reciprocal."""
    return values / torch.full((), divisor, dtype=values.dtype, device=values.device)


class _StraightThrough(torch.autograd.Function):
    """Bengio et al., arXiv:1308.3432: rounding has the gradient of no rounding, and clipping that of clipping: none."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, rounding: Rounding) -> torch.Tensor:
        values, inside = rounding(weight)
        ctx.dtype = weight.dtype
        ctx.save_for_backward(*([] if inside is None else [inside]))
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradients[0].to(ctx.dtype)
        for inside in ctx.saved_tensors:
            gradient = gradient * inside
        return gradient, None


def straight_through(weight: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """`rounding(weight).values`, with the gradient of the weight where it is inside the range and none outside."""
    values: torch.Tensor = _StraightThrough.apply(weight, rounding)  # type: ignore[no-untyped-call]
    return values
