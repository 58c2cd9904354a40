"""Weights of 4 bits, dequantized by one kernel into a matrix with or without a border: nf4 and fp4, with scales in
float32 or themselves in 8 bits, to the bit what bitsandbytes makes of them."""

# Triton reads annotations, which must be no strings.

from typing import Any

import torch

from qft.kernels.jit import ceil_div, jit, launch, tl

COLUMNS = 2048
"""That one program makes of a row."""


@jit
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    packed, code, absmax, code2, absmax2, offset, out, columns, stride,
    BLOCK: tl.constexpr, BLOCK2: tl.constexpr, NESTED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Row program_id(0), columns from program_id(1) * SIZE on."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * SIZE
    block = tl.arange(0, SIZE // BLOCK)
    start = first + block * BLOCK
    there = start < columns
    number = (row * columns + start) // BLOCK
    scale = tl.load(absmax + number, mask=there, other=0)
    if NESTED:
        outer = tl.load(absmax2 + number // BLOCK2, mask=there, other=0.0)
        scale = tl.load(code2 + scale.to(tl.int32)) * outer + tl.load(offset)
    half = tl.arange(0, BLOCK // 2)
    place = (row * columns + start)[:, None] // 2 + half[None, :]
    both = tl.load(packed + place, mask=there[:, None], other=0).to(tl.int32)
    high = tl.load(code + (both >> 4)) * scale[:, None]
    low = tl.load(code + (both & 15)) * scale[:, None]
    values = tl.reshape(tl.join(high, low), (SIZE,))
    column = first + tl.arange(0, SIZE)
    tl.store(out + row * stride + column, values.to(out.dtype.element_ty), mask=column < columns)


def fits(state: Any, columns: int) -> bool:
    """Whether the kernel takes a weight with such rows, of this quantization state of bitsandbytes'."""
    block = state.blocksize
    whole = block & (block - 1) == 0 and columns % block == 0 and block <= COLUMNS
    return bool(whole and state.quant_type in ("nf4", "fp4") and (not state.nested or state.state2.absmax.ndim == 1))


def dequantize_into(packed: torch.Tensor, state: Any, out: torch.Tensor, size: int = COLUMNS, warps: int = 4) -> None:
    """Write the weight [rows, columns] of bitsandbytes' `packed` codes and quantization state into `out`, a matrix on
    their device, in any 16-bit dtype, whose rows may lie apart."""
    rows, columns = out.shape
    second = state.state2 if state.nested else None
    launch(_dequantize_kernel, (rows, ceil_div(columns, size)),
        packed.view(torch.uint8), state.code, state.absmax,
        second.code if second else state.code, second.absmax if second else state.absmax,
        state.offset if second else state.code,
        out, columns, out.stride(0),
        BLOCK=state.blocksize, BLOCK2=second.blocksize if second else 1, NESTED=state.nested, SIZE=size,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip


def dequantized(packed: torch.Tensor, state: Any, rows: int, columns: int) -> torch.Tensor:
    """The reference, [rows, columns] in float32."""
    scale = state.absmax
    if state.nested:
        outer = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: scale.numel()]
        scale = state.state2.code[scale.long()] * outer + state.offset
    codes = packed.view(torch.uint8).flatten()
    numbers = torch.stack([codes >> 4, codes & 15], 1).flatten()[: rows * columns]
    values: torch.Tensor = state.code[numbers.long()] * scale.repeat_interleave(state.blocksize)[: rows * columns]
    return values.view(rows, columns)
