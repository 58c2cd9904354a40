"""Products of one input with one or several layers and their LoRA: out = x Wᵀ + s (x Aᵀ) Bᵀ + bias, exact but for how
16-bit numbers round, with sums in float32.

Forward it is [x | s x Aᵀ] [W | B]ᵀ, back [g | s g B] [W ; A]: nothing is added to an output in a pass of its own.
Where g W is in float8, and of MLPs x Wᵀ (float8.py), what the adapter adds is added in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from qft.kernels import float8
from qft.kernels.buffers import bordered_empty, rows_of, with_border
from qft.kernels.keep import source_of
from qft.kernels.layer import Matrix, Stack
from qft.kernels.narrow import extend

Back = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def project(x: torch.Tensor, stack: Stack) -> tuple[torch.Tensor, ...]:
    """The outputs [..., rows] of each layer of the stack, for x [..., columns]."""
    found: tuple[torch.Tensor, ...] = Project.apply(x, stack, None, *stack.pairs)  # type: ignore[no-untyped-call]
    return found


def project_joint(x: torch.Tensor, stack: Stack, *, kept: bool = True) -> torch.Tensor:
    """All outputs side by side, [..., rows of all], which are kept for the backward pass of what comes next, or made
    again there."""
    found: tuple[torch.Tensor] = Project.apply(x, stack, kept, *stack.pairs)  # type: ignore[no-untyped-call]
    return found[0]


def joint(x: torch.Tensor, stack: Stack) -> tuple[torch.Tensor, torch.Tensor]:
    """All outputs side by side, and s x Aᵀ [rows, rank]."""
    multiply, inner = multiplier(rows_of(x), stack)
    if stack.forward_in_float8:
        return multiply(slice(0, stack.rows)).view(*x.shape[:-1], -1), inner
    out = bordered_empty((*x.shape[:-1], stack.rows), stack.border, x)
    multiply(slice(0, stack.rows), rows_of(out))
    return out, inner


def each(x: torch.Tensor, stack: Stack) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The outputs one by one, and s x Aᵀ."""
    multiply, inner = multiplier(rows_of(x), stack)
    return tuple(multiply(part).view(*x.shape[:-1], -1) for part in stack.row_parts), inner


Multiply = Callable[..., torch.Tensor]
"""From a part of a stack's rows, and where to if not into a new tensor: the outputs [rows, rows of that part]."""


def multiplier(x: torch.Tensor, stack: Stack) -> tuple[Multiply, torch.Tensor]:
    """What multiplies x [rows, columns] until the next matrix is made, and s x Aᵀ [rows, rank]."""
    matrix = stack.matrix(x.device, forward=True)
    if matrix.scales is None:
        whole, inner = with_lora(x, stack, matrix)
        return partial(_in_half, whole, matrix.weight, stack.made), inner
    border, inner = x.new_empty(len(x), stack.border), x.new_empty(len(x), stack.rank)
    a, one = matrix.below[: stack.rank].t(), stack.rank if stack.has_bias else -1
    extend(x, border, a, 0, fill=stack.border, one=one, inner=inner, copies=False)
    return partial(_in_float8, float8.quantized_rows(x), border, matrix, stack), inner


def _in_half(
    whole: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, part: slice, out: torch.Tensor | None = None
) -> torch.Tensor:
    return in_dtype(whole, weight[part].t(), dtype) if out is None else torch.mm(whole, weight[part].t(), out=out)


def _in_float8(
    rows: tuple[torch.Tensor, torch.Tensor], border: torch.Tensor, matrix: Matrix, stack: Stack, part: slice
) -> torch.Tensor:
    assert matrix.scales is not None
    out = float8.multiply(*rows, matrix.weight[part], matrix.scales[:, part], border.dtype)
    return float8.add_product(out, border, matrix.right[part].t(), stack.rank + stack.has_bias).to(stack.made)


def in_dtype(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a b, not rounded on the way to `dtype`."""
    if dtype == a.dtype:
        return torch.mm(a, b)
    if isinstance(a, FakeTensor):  # which stands for one on a GPU
        return a.new_empty(len(a), b.shape[1], dtype=dtype)
    if a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a.to(dtype), b.to(dtype))


def with_lora(x: torch.Tensor, stack: Stack, matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """[x | s x Aᵀ | 1 for a bias], x itself where it has a border, and s x Aᵀ [rows, rank]."""
    whole = with_border(x, stack.border)
    if whole is None:
        whole = bordered(x, stack.columns, stack.border)
    inner, a = x.new_empty(len(x), stack.rank), matrix.below[: stack.rank].t()
    one = stack.rank if stack.has_bias else -1
    extend(x, whole, a, stack.columns, fill=stack.border, one=one, inner=inner)
    return whole, inner


def bordered(like: torch.Tensor, columns: int, border: int) -> torch.Tensor:
    """The whole of a new tensor [rows, columns] with a border."""
    made = with_border(bordered_empty((len(like), columns), border, like), border)
    assert made is not None
    return made


def gradients(
    stack: Stack, g: torch.Tensor, gb: torch.Tensor, x: torch.Tensor, inner: torch.Tensor
) -> list[torch.Tensor | None]:
    """Of A and B of each layer: g [rows, rows of all], gb = s g B and inner = s x Aᵀ [rows, rank]."""
    found: list[torch.Tensor | None] = []
    a = next((a for a in stack.pairs[::2] if a is not None), None)
    of_a = None if a is None else in_dtype(gb.t(), x, a.dtype)
    for layer, row, rank in zip(stack.layers, stack.row_parts, stack.rank_parts, strict=True):
        _, b = layer.pair
        if b is None or of_a is None:
            found += [None, None]
        else:
            found += [of_a[rank], in_dtype(g[:, row].t(), inner[:, rank], b.dtype)]
    return found


def back(stack: Stack, given: Sequence[torch.Tensor | None], rows: torch.Tensor, wanted: bool) -> Back:
    """Of the gradients [rows, rows of a layer] of each layer's output, or of all side by side: themselves side by side,
    s g B [rows, rank], and, if it is wanted, g W + s (g B) A [rows, columns]. `rows` is a tensor of as many rows."""
    matrix, whole = stack.matrix(rows.device, forward=False), None
    if matrix.scales is not None and len(given) == 1 and given[0] is not None:
        border = rows.new_empty(len(rows), stack.border)
        extend(given[0], border, matrix.right[:, : stack.rank], 0, fill=stack.border, copies=False)
        dx = _back_in_float8(given[0], border, matrix, stack) if wanted else None
        return given[0], border[:, : stack.rank], dx
    if given[0] is not None:
        whole = with_border(given[0], stack.border, stack.rows)
    if whole is None:
        whole = bordered(rows, stack.rows, stack.border)
    joint = len(given) < len(stack.layers)
    row_parts, rank_parts = (
        ([slice(0, stack.rows)], [slice(0, stack.rank)]) if joint else (stack.row_parts, stack.rank_parts)
    )
    for number, (gradient, row, rank) in enumerate(zip(given, row_parts, rank_parts, strict=True)):
        part = whole[:, row.start :]
        b = matrix.right[row, rank]
        fill = 0 if number else stack.border
        if gradient is None:
            part[:, : row.stop - row.start] = 0
            whole[:, stack.rows + rank.start : stack.rows + (rank.stop if number else stack.border)] = 0
        else:
            extend(gradient, part, b, stack.rows - row.start, rank.start, fill=fill)
    g, border, dx = whole[:, : stack.rows], whole[:, stack.rows :], None
    if wanted and matrix.scales is None:
        dx = torch.mm(whole, matrix.weight[:, : stack.columns])
    elif wanted:
        dx = _back_in_float8(g, border, matrix, stack)
    return g, border[:, : stack.rank], dx


def _back_in_float8(g: torch.Tensor, border: torch.Tensor, matrix: Matrix, stack: Stack) -> torch.Tensor:
    assert matrix.scales is not None
    dx = float8.multiply(*float8.quantized_rows(g), matrix.weight, matrix.scales, g.dtype)
    return float8.add_product(dx, border, matrix.below, stack.rank)


class Project(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, stack: Stack, kept: bool | None, *pairs: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """`kept`: whether outputs that lie side by side are; None: they do not."""
        if kept is None:
            outs, inner = each(x, stack)
        else:
            out, inner = joint(x, stack)
            outs = (out,)
        ctx.stack, ctx.given, ctx.spent, ctx.source = stack, None, False, source_of(x)
        ctx.save_for_backward(None if ctx.source else x, inner, outs[0] if kept else None)
        ctx.set_materialize_grads(False)
        return outs

    @staticmethod
    def kept(ctx: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x, s x Aᵀ and the outputs side by side if they were kept; of a checkpointed block, they can be asked for
        once."""
        x, inner, both = ctx.saved_tensors
        return ctx.source.again(ctx.stack.border) if ctx.source else x, inner, both

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients_of: torch.Tensor | None) -> tuple[Any, ...]:
        stack: Stack = ctx.stack
        x, inner = ctx.given or Project.kept(ctx)[:2]
        ctx.given = None
        flat = rows_of(x)
        given = [None if g is None else rows_of(g.to(stack.dtype)) for g in gradients_of]
        g, gb, dx = back(stack, given, flat, ctx.needs_input_grad[0])
        found = gradients(stack, g, gb, flat, inner)
        return (dx.view(x.shape) if dx is not None else None, None, None, *found)
