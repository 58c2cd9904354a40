"""Rotary positions of queries and keys: x cos + rotate_half(x) sin, in float32 with one rounding, and back.

Shapes: q [rows, heads, tokens, size], k the same with its own heads, cos and sin [rows or 1, tokens, size]."""

# Triton reads annotations, which must be no strings.

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qft.kernels.buffers import bordered_empty
from qft.kernels.jit import by_triton, ceil_div, jit, launch, power_of_2, tl
from qft.kernels.layer import Stack

HEADS = 8
"""That one program turns, of one token."""


@jit
def _turn(  # type: ignore[no-untyped-def]
    x, out, head, heads, there, x_head, out_head, column, half, cos1, cos2, sin1, sin2, BACK: tl.constexpr
):
    """Heads of one token, from x to out."""
    line = head[:, None].to(tl.int64)
    mask = there & (line < heads)
    source, target = x + line * x_head + column, out + line * out_head + column
    x1 = tl.load(source, mask=mask, other=0).to(tl.float32)
    x2 = tl.load(source + half, mask=mask, other=0).to(tl.float32)
    y1 = x1 * cos1 + x2 * sin2 if BACK else x1 * cos1 - x2 * sin1
    y2 = x2 * cos2 - x1 * sin1 if BACK else x2 * cos2 + x1 * sin2
    tl.store(target, y1.to(out.dtype.element_ty), mask=mask)
    tl.store(target + half, y2.to(out.dtype.element_ty), mask=mask)


@jit
def _rotary_kernel(  # type: ignore[no-untyped-def]
    q, k, cos, sin, out_q, out_k, tokens, q_heads, k_heads, half, q_programs,
    q_row, q_head, q_token, k_row, k_head, k_token, cos_row, cos_token,
    oq_row, oq_head, oq_token, ok_row, ok_head, ok_token,
    BACK: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row, token = (tl.program_id(0) // tokens).to(tl.int64), (tl.program_id(0) % tokens).to(tl.int64)
    part = tl.program_id(1)
    column = tl.arange(0, SIZE)[None, :]
    there = column < half
    angle = row * cos_row + token * cos_token + column
    cos1 = tl.load(cos + angle, mask=there, other=0).to(tl.float32)
    cos2 = tl.load(cos + angle + half, mask=there, other=0).to(tl.float32)
    sin1 = tl.load(sin + angle, mask=there, other=0).to(tl.float32)
    sin2 = tl.load(sin + angle + half, mask=there, other=0).to(tl.float32)
    head = tl.arange(0, HEADS)
    if part < q_programs:
        x, out = q + row * q_row + token * q_token, out_q + row * oq_row + token * oq_token
        at = part * HEADS + head
        _turn(x, out, at, q_heads, there, q_head, oq_head, column, half, cos1, cos2, sin1, sin2, BACK)
    else:
        x, out = k + row * k_row + token * k_token, out_k + row * ok_row + token * ok_token
        at = (part - q_programs) * HEADS + head
        _turn(x, out, at, k_heads, there, k_head, ok_head, column, half, cos1, cos2, sin1, sin2, BACK)


Pair = tuple[torch.Tensor, torch.Tensor]


def rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    outs: Pair | None = None,
    *,
    back: bool = False,
) -> Pair:
    """q and k turned, into `outs` if they are given; `back`: the gradients of both for those of what they were turned
    into."""
    outs = outs or (_like_rows(q), _like_rows(k))
    if not by_triton(q):
        return outs[0].copy_(_turned(q, cos, sin, back)), outs[1].copy_(_turned(k, cos, sin, back))
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    rows, _, tokens, size = q.shape
    parts = ceil_div(q.shape[1], HEADS), ceil_div(k.shape[1], HEADS)
    strides = [stride for x in (q, k) for stride in x.stride()[:3]]
    strides += [cos.stride(0) if len(cos) > 1 else 0, cos.stride(1)]
    strides += [stride for x in outs for stride in x.stride()[:3]]
    launch(_rotary_kernel, (rows * tokens, sum(parts)),
        q, k, cos, sin, *outs, tokens, q.shape[1], k.shape[1], size // 2, parts[0], *strides,
        BACK=back, HEADS=HEADS, SIZE=power_of_2(size // 2), num_warps=4,
    )  # fmt: skip
    return outs


def _like_rows(x: torch.Tensor) -> torch.Tensor:
    """[rows, heads, tokens, size], laid out as the [rows, tokens, heads, size] that a linear layer makes."""
    _, heads, tokens, size = x.shape
    strides = (tokens * heads * size, size, heads * size, 1)
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x1, x2 = x.to(wide).chunk(2, -1)
    c1, c2 = cos.to(wide).unsqueeze(1).chunk(2, -1)
    s1, s2 = sin.to(wide).unsqueeze(1).chunk(2, -1)
    both = (x1 * c1 + x2 * s2, x2 * c2 - x1 * s1) if back else (x1 * c1 - x2 * s1, x2 * c2 + x1 * s2)
    return torch.cat(both, -1).to(x.dtype)


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, stack: Stack | None = None) -> Pair:
    """q and k turned. If they come of the first two layers of a stack, its gradients are put where they are needed."""
    found: Pair = Rotate.apply(q, k, cos, sin, stack)  # type: ignore[no-untyped-call]
    return found


class Rotate(torch.autograd.Function):
    """See rotary."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, stack: Stack | None
    ) -> Pair:
        ctx.stack = stack
        ctx.save_for_backward(cos, sin)
        return rotate(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gq: torch.Tensor, gk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        outs = _side_by_side(gq, gk, ctx.stack)
        return (*rotate(gq, gk, cos, sin, outs, back=True), None, None, None)


def _side_by_side(gq: torch.Tensor, gk: torch.Tensor, stack: Stack | None) -> Pair | None:
    """Places for gradients of the outputs of the first two layers of a stack, behind which there is room for the
    others and a border; None: they are none of these."""
    rows, _, tokens, size = gq.shape
    widths = [x.shape[1] * size for x in (gq, gk)]
    if stack is None or {gq.dtype, stack.made} != {stack.dtype} or [layer.rows for layer in stack.layers[:2]] != widths:
        return None
    made = bordered_empty((rows, tokens, stack.rows), stack.border, gq)
    q, k = (made[..., part].view(rows, tokens, -1, size).transpose(1, 2) for part in stack.row_parts[:2])
    return q, k


def may_rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether shapes, dtypes and layout are those that `rotate` is for."""
    shapes = q.dim() == k.dim() == 4 and cos.shape == sin.shape and cos.dim() == 3 and cos.stride() == sin.stride()
    if not shapes or cos.stride(-1) != 1 or cos.requires_grad or sin.requires_grad:
        return False
    same = q.dtype == k.dtype and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
    fits = cos.shape[1:] == (q.shape[2], q.shape[3]) and cos.shape[0] in (1, q.shape[0]) and q.shape[3] % 2 == 0
    return same and fits and torch.result_type(q, cos) == q.dtype
