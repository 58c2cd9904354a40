"""Weights of 4 bits, dequantized by one kernel into a matrix with or without a border: nf4 and fp4, with scales in
float32 or themselves in 8 bits, to the bit what bitsandbytes makes of them."""

# Triton reads annotations, which must be no strings.

from typing import Any

import torch

from qft.kernels.jit import ceil_div, jit, launch, power_of_2, tl

COLUMNS, WARPS = 2048, 4
"""That one program makes of a row, and by how many warps."""
FAST_COLUMNS, FAST_WARPS = 4096, 2


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


def _eight_codes(dtype: torch.dtype) -> str:
    """PTX: from eight codes in $4, a scale in $5 and the code book at $6, eight numbers of 16 bits in $0 to $3. Each
    lane of a warp holds one number of the book (twice over), and is asked for it: a load of each would take an address
    of each, and the kernel is bound by how many instructions it has."""
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    lines = [
        ".reg .b32 lane, at, high, low; .reg .b64 offset, place; .reg .f32 book;",
        "mov.u32 lane, %laneid; and.b32 lane, lane, 15; mul.wide.u32 offset, lane, 4; add.s64 place, $6, offset;",
        "ld.global.nc.f32 book, [place];",
    ]
    for byte in range(4):
        for number, shift in (("high", 8 * byte + 4), ("low", 8 * byte)):
            lines.append(f"shr.u32 at, $4, {shift}; shfl.sync.idx.b32 {number}, book, at, 31, 0xffffffff;")
            lines.append(f"mul.rn.f32 {number}, {number}, $5;")
        lines.append(f"cvt.rn.{kind}x2.f32 ${byte}, low, high;")
    return "\n".join(["{", *lines, "}"])


_EIGHT = {dtype: _eight_codes(dtype) for dtype in (torch.bfloat16, torch.float16)}


@jit
def _fast_kernel(  # type: ignore[no-untyped-def]
    packed, code, absmax, code2, absmax2, offset, out, columns, stride,
    BLOCK: tl.constexpr, BLOCK2: tl.constexpr, NESTED: tl.constexpr, SIZE: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """The same for what lies in memory as words of 32 bits: eight codes, or two numbers."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * (SIZE // BLOCK) + tl.arange(0, SIZE // BLOCK)
    blocks = columns // BLOCK
    there = block < blocks
    number = (row * blocks).to(tl.int32) + block
    scale = tl.load(absmax + number, mask=there, other=0)
    if NESTED:
        outer = tl.load(absmax2 + number // BLOCK2, mask=there, other=0.0)
        scale = tl.load(code2 + scale.to(tl.int32)) * outer + tl.load(offset)
    word = block[:, None] * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
    source = packed.to(tl.pointer_type(tl.int32)) + row * (columns // 8)
    codes = tl.load(source + word, mask=there[:, None], other=0)
    scales = tl.broadcast_to(scale[:, None], (SIZE // BLOCK, BLOCK // 8))
    book = code.to(tl.int64) + tl.zeros_like(codes)
    a, b, c, d = tl.inline_asm_elementwise(
        EIGHT, "=r,=r,=r,=r,r,r,l", [codes, scales, book],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    pairs = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (SIZE // BLOCK, BLOCK // 2))
    pair = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    target = out.to(tl.pointer_type(tl.int32)) + row * (stride // 2)
    tl.store(target + pair, pairs, mask=there[:, None])


def _in_words(packed: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether the fast kernel takes them: PTX is for NVIDIA's GPUs, and words must begin where words do."""
    places = (packed.data_ptr(), out.data_ptr(), 2 * out.stride(0))
    return packed.is_cuda and torch.version.hip is None and all(place % 16 == 0 for place in places)


def fits(state: Any, columns: int) -> bool:
    """Whether the kernel takes a weight with such rows, of this quantization state of bitsandbytes'."""
    block = state.blocksize
    whole = block & (block - 1) == 0 and columns % block == 0 and block <= COLUMNS
    return bool(whole and state.quant_type in ("nf4", "fp4") and (not state.nested or state.state2.absmax.ndim == 1))


def dequantize_into(
    packed: torch.Tensor, state: Any, out: torch.Tensor, size: int | None = None, warps: int | None = None
) -> None:
    """Write the weight [rows, columns] of bitsandbytes' `packed` codes and quantization state into `out`, a matrix on
    their device, in any 16-bit dtype, whose rows may lie apart."""
    rows, columns = out.shape
    second = state.state2 if state.nested else None
    fast = _in_words(packed, out)
    size = size or (min(FAST_COLUMNS, max(power_of_2(columns), state.blocksize)) if fast else COLUMNS)
    launch(_fast_kernel if fast else _dequantize_kernel, (rows, ceil_div(columns, size)),
        packed.view(torch.uint8), state.code, state.absmax,
        second.code if second else state.code, second.absmax if second else state.absmax,
        state.offset if second else state.code,
        out, columns, out.stride(0),
        BLOCK=state.blocksize, BLOCK2=second.blocksize if second else 1, NESTED=state.nested, SIZE=size,
        num_warps=warps or (FAST_WARPS if fast else WARPS), enable_fp_fusion=False,
        **({"EIGHT": _EIGHT[out.dtype]} if fast else {}),
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
