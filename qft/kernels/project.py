"""Products of one input with one or several layers and their LoRA: out = x Wᵀ + s (x Aᵀ) Bᵀ + bias, exact but for how
16-bit numbers round, with sums in float32.

Forward it is [x | s x Aᵀ] [W | B]ᵀ, back [g | s g B] [W ; A]: nothing is added to an output in a pass of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qft.kernels.buffers import bordered_empty, rows_of, with_border
from qft.kernels.layer import Stack


def project(x: torch.Tensor, stack: Stack) -> tuple[torch.Tensor, ...]:
    """The outputs [..., rows] of each layer of the stack, for x [..., columns]."""
    found: tuple[torch.Tensor, ...] = Project.apply(x, stack, False, *stack.pairs)  # type: ignore[no-untyped-call]
    return found


def project_joint(x: torch.Tensor, stack: Stack) -> torch.Tensor:
    """All outputs side by side, [..., rows of all], which are kept for the backward pass of what comes next."""
    found: tuple[torch.Tensor] = Project.apply(x, stack, True, *stack.pairs)  # type: ignore[no-untyped-call]
    return found[0]


def in_dtype(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a b, not rounded on the way to `dtype`."""
    if dtype == a.dtype:
        return torch.mm(a, b)
    if a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a.to(dtype), b.to(dtype))


def extended(x: torch.Tensor, border: int) -> torch.Tensor:
    """[rows, columns + border] that begins with x [rows, columns], of which the border is to be written: where x has
    one already, x itself."""
    whole = with_border(x, border)
    if whole is None:
        made = bordered_empty(x.shape, border, x)
        made.copy_(x)
        whole = with_border(made, border)
        assert whole is not None
    return whole


def with_lora(x: torch.Tensor, stack: Stack, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[x | s x Aᵀ | 1 for a bias], and s x Aᵀ [rows, border]."""
    inner = torch.mm(x, matrix[stack.rows :, : stack.columns].t())
    whole = extended(x, stack.border)
    whole[:, stack.columns :] = inner
    if stack.has_bias:
        whole[:, stack.columns + stack.rank] = 1
    return whole, inner


def gradients(stack: Stack, g: torch.Tensor, gb: torch.Tensor, x: torch.Tensor, inner: torch.Tensor) -> list[Any]:
    """Of A and B of each layer: g [rows, rows of all], gb = s g B [rows, border], inner = s x Aᵀ."""
    found: list[Any] = []
    a = next((a for a in stack.pairs[::2] if a is not None), None)
    of_a = None if a is None else in_dtype(gb[:, : stack.rank].t(), x, a.dtype)
    for layer, row, rank in zip(stack.layers, stack.row_parts, stack.rank_parts, strict=True):
        _, b = layer.pair
        if b is None or of_a is None:
            found += [None, None]
        else:
            found += [of_a[rank], in_dtype(g[:, row].t(), inner[:, rank], b.dtype)]
    return found


def back(stack: Stack, whole: torch.Tensor, wanted: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Of g in `whole` [rows, rows of all + border], whose border is written: g W + s (g B) A, if it is wanted, and
    s g B [rows, border]."""
    matrix = stack.matrix(forward=False)
    gb = torch.mm(whole[:, : stack.rows], matrix[: stack.rows, stack.columns :])
    if not wanted:
        return None, gb
    whole[:, stack.rows :] = gb
    return torch.mm(whole, matrix[:, : stack.columns]), gb


class Project(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, stack: Stack, joint: bool, *pairs: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        flat, matrix = rows_of(x), stack.matrix(forward=True)
        whole, inner = with_lora(flat, stack, matrix)
        ctx.stack, ctx.kept, ctx.spent = stack, None, False
        if joint:
            outs: tuple[torch.Tensor, ...] = (bordered_empty((*x.shape[:-1], stack.rows), stack.border, x),)
            torch.mm(whole, matrix[: stack.rows].t(), out=rows_of(outs[0]))
            ctx.save_for_backward(x, inner, *outs)
        else:
            outs = tuple(x.new_empty(*x.shape[:-1], layer.rows) for layer in stack.layers)
            for made, part in zip(outs, stack.row_parts, strict=True):
                torch.mm(whole, matrix[part].t(), out=made.view(len(flat), -1))
            ctx.save_for_backward(x, inner)
        ctx.set_materialize_grads(False)
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients_of: torch.Tensor | None) -> tuple[Any, ...]:
        stack: Stack = ctx.stack
        x, inner = ctx.kept or ctx.saved_tensors[:2]
        ctx.kept = None
        flat = rows_of(x)
        whole = _gathered(stack, gradients_of, flat)
        wanted = ctx.needs_input_grad[0]
        dx, gb = back(stack, whole, wanted)
        found = gradients(stack, whole[:, : stack.rows], gb, flat, inner)
        return (dx.view(x.shape) if dx is not None else None, None, None, *found)


def _gathered(stack: Stack, given: tuple[torch.Tensor | None, ...], like: torch.Tensor) -> torch.Tensor:
    """Gradients of the outputs side by side, with a border."""
    if len(given) == 1 and given[0] is not None:
        return extended(rows_of(given[0]), stack.border)
    made = bordered_empty((len(like), stack.rows), stack.border, like)
    for part, gradient in zip(stack.row_parts, given, strict=True):
        if gradient is None:
            made[:, part] = 0
        else:
            made[:, part].view(gradient.shape).copy_(gradient)
    whole = with_border(made, stack.border)
    assert whole is not None
    return whole
