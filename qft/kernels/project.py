"""Products of one input with one or several layers and their LoRA: out = x Wᵀ + s (x Aᵀ) Bᵀ + bias, exact but for how
16-bit numbers round, with sums in float32.

Forward it is [x | s x Aᵀ] [W | B]ᵀ, back [g | s g B] [W ; A]: nothing is added to an output in a pass of its own.
Where x Wᵀ or g W is in float8 (float8.py), what the adapter adds is added in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from qft.kernels import float8
from qft.kernels.buffers import bordered_empty, rows_of, with_border
from qft.kernels.keep import source_of
from qft.kernels.layer import Matrix, Stack
from qft.kernels.narrow import begins_with, extend
from qft.kernels.rounding import WIDEST, rounded, rounded_beside


@dataclass
class Back:
    """Of a stack."""

    g: torch.Tensor
    """Gradients of its outputs, side by side, [rows, rows of all]."""
    gb: torch.Tensor
    """s g B, [rows, rank]."""
    dx: torch.Tensor | None
    """g W + s (g B) A, [rows, columns]; None: nobody wants it."""
    pending: float8.Added | None = None
    """What dx lacks yet."""


def project(x: torch.Tensor, stack: Stack) -> tuple[torch.Tensor, ...]:
    """The outputs [..., rows] of each layer of the stack, for x [..., columns]."""
    found: tuple[torch.Tensor, ...] = Project.apply(x, stack, None, False, *stack.pairs)  # type: ignore[no-untyped-call]
    return found


def project_joint(x: torch.Tensor, stack: Stack, *, kept: bool = True, pending: bool = False) -> torch.Tensor:
    """All outputs side by side, [..., rows of all], which are kept for the backward pass of what comes next, or made
    again there. `pending`: see `joint`."""
    found: tuple[torch.Tensor] = Project.apply(x, stack, kept, pending, *stack.pairs)  # type: ignore[no-untyped-call]
    return found[0]


Joint = tuple[torch.Tensor, torch.Tensor, float8.Added | None]
"""All outputs side by side, s x Aᵀ in the first columns of a matrix, and what the outputs lack."""


def joint(x: torch.Tensor, stack: Stack, *, pending: bool = False) -> Joint:
    """`pending`: what an adapter adds to a product in float8 may be left to the caller."""
    if stack.forward_in_float8:
        return _joint_in_float8(x, stack, pending)
    multiply, inner = multiplier(rows_of(x), stack)
    out = bordered_empty((*x.shape[:-1], stack.rows), stack.border, x)
    multiply(slice(0, stack.rows), rows_of(out))
    return out, inner, None


def _joint_in_float8(x: torch.Tensor, stack: Stack, pending: bool) -> Joint:
    matrix, flat = stack.matrix(x.device, forward=True, in_float8=True), rows_of(x)
    assert matrix.factor is not None
    border = flat.new_empty(len(flat), stack.border)
    a, one = matrix.below[: stack.rank].t(), stack.rank if stack.has_bias else -1
    extend(flat, border, a, 0, fill=stack.border, one=one, copies=False)
    out = float8.multiply(rounded(flat, matrix.factor), matrix.weight, x.dtype)
    added = stack.added(border, matrix.right)
    pending = pending and added.fits(out)
    made = (out if pending else added.to(out)).view(*x.shape[:-1], -1)
    return made, border, added if pending else None


def each(x: torch.Tensor, stack: Stack) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The outputs one by one, and s x Aᵀ."""
    multiply, inner = multiplier(rows_of(x), stack)
    return tuple(multiply(part).view(*x.shape[:-1], -1) for part in stack.row_parts), inner


Multiply = Callable[..., torch.Tensor]
"""From a part of a stack's rows, and where to if not into a new tensor: the outputs [rows, rows of that part]."""


def multiplier(x: torch.Tensor, stack: Stack) -> tuple[Multiply, torch.Tensor]:
    """What multiplies x [rows, columns] until the next matrix is made, and s x Aᵀ [rows, rank]."""
    matrix = stack.matrix(x.device, forward=True)
    whole, inner = with_lora(x, stack, matrix)
    return partial(_in_half, whole, matrix.weight, stack.made), inner


def _in_half(
    whole: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, part: slice, out: torch.Tensor | None = None
) -> torch.Tensor:
    return in_dtype(whole, weight[part].t(), dtype) if out is None else torch.mm(whole, weight[part].t(), out=out)


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
    """Of A and B of each layer: g [rows, rows of all], gb = s g B and inner = s x Aᵀ [rows, rank or more]."""
    found: list[torch.Tensor | None] = []
    pairs = [layer.pair for layer in stack.layers]
    a = next((a for a, _ in pairs if a is not None), None)
    of_a = None if a is None else in_dtype(gb.t(), x, a.dtype)
    for (_, b), row, rank in zip(pairs, stack.row_parts, stack.rank_parts, strict=True):
        if b is None or of_a is None:
            found += [None, None]
        else:
            found += [of_a[rank], in_dtype(g[:, row].t(), inner[:, rank], b.dtype)]
    return found


def back(
    stack: Stack,
    given: Sequence[torch.Tensor | None],
    rows: torch.Tensor,
    wanted: bool,
    *,
    most: torch.Tensor | None = None,
    pending: bool = False,
) -> Back:
    """From the gradients [rows, rows of a layer] of each layer's output, or of all side by side. `rows` is a tensor of
    as many rows. `most`: bits of the largest of each row, if they are known (rounding.py). `pending`: of a product in
    float8, what the adapter adds may be left to the caller."""
    if stack.float8:
        return _back_in_float8(stack, _side_by_side(stack, given, rows), wanted, most, pending)
    matrix, whole = stack.matrix(rows.device, forward=False), None
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
    if wanted:
        dx = torch.mm(whole, matrix.weight[:, : stack.columns])
    return Back(g, border[:, : stack.rank], dx)


def _side_by_side(stack: Stack, given: Sequence[torch.Tensor | None], rows: torch.Tensor) -> torch.Tensor:
    """Gradients of all outputs [rows, rows of all]: where the first one lies, if there is room behind it."""
    if len(given) == 1 and given[0] is not None:
        return given[0]
    whole = None if given[0] is None else with_border(given[0], stack.border, stack.rows)
    whole = rows.new_empty(len(rows), stack.rows) if whole is None else whole[:, : stack.rows]
    for gradient, row in zip(given, stack.row_parts, strict=True):
        if gradient is None:
            whole[:, row] = 0
        elif not begins_with(whole[:, row], gradient):
            whole[:, row] = gradient
    return whole


def _back_in_float8(stack: Stack, g: torch.Tensor, wanted: bool, most: torch.Tensor | None, pending: bool) -> Back:
    matrix = stack.matrix(g.device, forward=False, in_float8=True)
    assert matrix.factor is not None
    border = g.new_empty(len(g), stack.border)
    gb = border[:, : stack.rank]
    if wanted and most is not None and 0 < stack.rank <= WIDEST:
        narrow = matrix.right[:, : float8.taken(stack.rank)]
        small = rounded_beside(g, matrix.factor, most, narrow, border)
    else:
        extend(g, border, matrix.right[:, : stack.rank], 0, fill=stack.border, copies=False)
        if not wanted:
            return Back(g, gb, None)
        small = rounded(g, matrix.factor, most)
    dx = float8.multiply(small, matrix.weight, g.dtype)
    added = float8.Added(border, matrix.below, stack.rank)
    return Back(g, gb, dx, added) if pending else Back(g, gb, added.to(dx))


class Project(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, stack: Stack, kept: bool | None, pending: bool, *pairs: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """`kept`: whether outputs that lie side by side are; None: they do not."""
        lacking = None
        if kept is None:
            outs, inner = each(x, stack)
        else:
            out, inner, lacking = joint(x, stack, pending=pending)
            outs = (out,)
        stack.lacking, ctx.lacks = lacking, lacking is not None
        ctx.stack, ctx.given, ctx.spent, ctx.source, ctx.most = stack, None, False, source_of(x), None
        ctx.save_for_backward(None if ctx.source else x, inner, outs[0] if kept else None)
        ctx.set_materialize_grads(False)
        return outs

    @staticmethod
    def kept(ctx: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x, s x Aᵀ in the first columns of a matrix, and the outputs side by side if they were kept; of a checkpointed
        block, they can be asked for once."""
        x, inner, both = ctx.saved_tensors
        return ctx.source.again(ctx.stack.border) if ctx.source else x, inner, both

    @staticmethod
    def most(ctx: Any, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Bits of the largest number of each row, if it is the gradient they were noted of, and not changed."""
        if ctx.most is None or gradient is None:
            return None
        bits, noted, version = ctx.most
        return bits if begins_with(noted, gradient) and gradient._version == version else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients_of: torch.Tensor | None) -> tuple[Any, ...]:
        stack: Stack = ctx.stack
        x, inner = ctx.given or Project.kept(ctx)[:2]
        flat, most = rows_of(x), Project.most(ctx, gradients_of[0])
        ctx.given = ctx.most = None
        given = [None if g is None else rows_of(g.to(stack.dtype)) for g in gradients_of]
        made = back(stack, given, flat, ctx.needs_input_grad[0], most=most)
        found = gradients(stack, made.g, made.gb, flat, inner)
        return (made.dx.view(x.shape) if made.dx is not None else None, None, None, None, *found)
