"""A matrix put beside its product with a narrow one, in one pass: [x | x N], where x may lie in its place already."""

# Triton reads annotations, which must be no strings.

from functools import cache
from typing import Any

import torch

from qft.kernels.jit import by_triton, ceil_div, jit, launch, power_of_2, tl

WIDEST = 128
"""Columns of a narrow matrix that the kernel takes; others are multiplied by torch."""
LINES, SIZE, WARPS, STAGES = 32, 256, 4, 3
"""64 lines and 5 stages, for which Triton takes Hopper's asynchronous products, were a tenth faster on an H200 and gave
rows that were wrong by some percent (tests/gpu/test_kernels.py); what goes wrong was not found."""
SPARED = 2**13
"""Bytes of a program's shared memory that are not for tiles."""


@jit
def _extend_kernel(  # type: ignore[no-untyped-def]
    x, out, narrow, inner, rows, columns, rank, at, one, x_stride, out_stride, border, narrow_row, narrow_column,
    COPY: tl.constexpr, FILL: tl.constexpr, KEEP: tl.constexpr,
    RANK: tl.constexpr, LINES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """LINES rows; `border` is where the border begins in a row of `out`, and `at` where x N begins in the border."""
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    row = line.to(tl.int64)[:, None]
    there = row < rows
    place = tl.arange(0, RANK)[None, :]
    total = tl.zeros((LINES, RANK), dtype=tl.float32)
    for first in range(0, columns, SIZE):
        column = first + tl.arange(0, SIZE)
        mask = there & (column[None, :] < columns)
        tile = tl.load(x + row * x_stride + column[None, :], mask=mask, other=0)
        if COPY:
            tl.store(out + row * out_stride + column[None, :], tile, mask=mask)
        taken = (column[:, None] < columns) & (place < rank)
        other = tl.load(narrow + column.to(tl.int64)[:, None] * narrow_row + place * narrow_column, mask=taken, other=0)
        total = tl.dot(tile, other, total, input_precision="ieee")
    result = total.to(out.dtype.element_ty)
    target = out + row * out_stride + border
    for chunk in tl.static_range(0, FILL, 64):
        last = chunk + tl.arange(0, 64)[None, :]
        content = tl.where(last == one, 1.0, 0.0) + tl.zeros((LINES, 64), dtype=tl.float32)
        tl.store(target + last, content.to(out.dtype.element_ty), mask=there & ((last < at) | (last >= at + rank)))
    tl.store(target + at + place, result, mask=there & (place < rank))
    if KEEP:
        tl.store(inner + row * rank + place, result, mask=there & (place < rank))


def extend(
    x: torch.Tensor,
    out: torch.Tensor,
    narrow: torch.Tensor,
    border: int,
    at: int = 0,
    *,
    fill: int = 0,
    one: int = -1,
    inner: torch.Tensor | None = None,
    copies: bool | None = None,
) -> None:
    """Write x [rows, columns] into `out` [rows, more], unless it is what is there, and x N, for a `narrow` N [columns,
    rank], into the columns from border + at on, and into `inner` [rows, rank] too. Of the `fill` columns from border
    on, the others become 0, and the one numbered `one` 1. `copies` False: `out` is for the product alone."""
    copies, rank = not begins_with(out, x) if copies is None else copies, narrow.shape[1]
    if not by_triton(x) or rank > WIDEST:
        _by_torch(x, out, narrow, border, at, fill, one, inner, copies)
        return
    wide = max(16, power_of_2(rank))
    launch(_extend_kernel, (ceil_div(len(x), LINES),),
        x, out, narrow, out if inner is None else inner, *x.shape, rank, at, one,
        x.stride(0), out.stride(0), border, *narrow.stride(),
        COPY=copies, FILL=fill, KEEP=inner is not None, RANK=wide, LINES=LINES, SIZE=SIZE,
        num_warps=WARPS, num_stages=_stages(x, wide),
    )  # fmt: skip


def _stages(x: torch.Tensor, wide: int) -> int:
    """Tiles that are on their way to a program at once, as many as its shared memory has room for."""
    room = _shared_bytes(x.device) - SPARED if x.is_cuda else 2**20
    return max(1, min(STAGES, room // ((LINES + wide) * SIZE * x.element_size())))


@cache
def _shared_bytes(device: torch.device) -> int:
    found: Any = torch.cuda.get_device_properties(device)
    return int(getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block))


def _by_torch(
    x: torch.Tensor,
    out: torch.Tensor,
    narrow: torch.Tensor,
    border: int,
    at: int,
    fill: int,
    one: int,
    inner: torch.Tensor | None,
    copies: bool,
) -> None:
    """The reference."""
    product = torch.mm(x, narrow)
    if copies:
        out[:, : x.shape[1]] = x
    out[:, border : border + fill] = 0
    out[:, border + at : border + at + narrow.shape[1]] = product
    if one >= 0 and fill:
        out[:, border + one] = 1
    if inner is not None:
        inner.copy_(product)


def begins_with(out: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether x is what is there."""
    same: bool = out.untyped_storage()._cdata == x.untyped_storage()._cdata
    return same and out.storage_offset() == x.storage_offset()
