"""Weights of 4 bits, dequantized by one kernel one above the other into a matrix with or without a border: nf4 and fp4,
with scales in float32 or themselves in 8 bits, to the bit what bitsandbytes makes of them."""

# Triton reads annotations, which must be no strings.

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from qft.kernels.jit import by_triton, ceil_div, jit, launch, power_of_2, tl

Held = tuple[torch.Tensor, Any]
"""A weight's codes and bitsandbytes' quantization state of them; or a weight of 16 bits, and None."""
MOST = 4
"""Weights that one matrix may hold."""
COLUMNS, WARPS = 2048, 4
"""That one program makes of a row, and by how many warps."""
FAST_COLUMNS, FAST_WARPS = 4096, 2


@jit
def scale_of(absmax, code2, absmax2, offset, number, there, BLOCK2: tl.constexpr, NESTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of blocks of 4-bit codes by their numbers."""
    scale = tl.load(absmax + number, mask=there, other=0)
    if NESTED:
        outer = tl.load(absmax2 + number // BLOCK2, mask=there, other=0.0)
        scale = tl.load(code2 + scale.to(tl.int32)) * outer + tl.load(offset)
    return scale


@jit
def pick(number, x0, x1, x2, x3, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of COUNT things the one of that number."""
    found = x0
    if COUNT > 1:
        found = tl.where(number == 1, x1, found)
    if COUNT > 2:
        found = tl.where(number == 2, x2, found)
    if COUNT > 3:
        found = tl.where(number == 3, x3, found)
    return found


@jit
def which(place, m0, m1, m2, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of COUNT things of m0, m1, ... each, one behind the other, the number of the one at a place, and its first."""
    number, first = place * 0, place * 0
    if COUNT > 1:
        first = tl.where(place >= m0, m0, first)
        number += (place >= m0).to(tl.int32)
    if COUNT > 2:
        first = tl.where(place >= m0 + m1, m0 + m1, first)
        number += (place >= m0 + m1).to(tl.int32)
    if COUNT > 3:
        first = tl.where(place >= m0 + m1 + m2, m0 + m1 + m2, first)
        number += (place >= m0 + m1 + m2).to(tl.int32)
    return number, first


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
    scale = scale_of(absmax, code2, absmax2, offset, (row * columns + start) // BLOCK, there, BLOCK2, NESTED)
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
    p0, a0, o0, f0, m0, p1, a1, o1, f1, m1, p2, a2, o2, f2, m2, p3, a3, o3, f3, m3, code, code2, out, columns, stride,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, BLOCK2: tl.constexpr, NESTED: tl.constexpr,
    SIZE: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """The same for COUNT weights, and what lies in memory as words of 32 bits: eight codes, or two numbers. Of each
    weight: codes, absmax, absmax of that, offset, rows."""
    number, first = which(tl.program_id(0), m0, m1, m2, COUNT)
    packed, absmax = pick(number, p0, p1, p2, p3, COUNT), pick(number, a0, a1, a2, a3, COUNT)
    absmax2, offset = pick(number, o0, o1, o2, o3, COUNT), pick(number, f0, f1, f2, f3, COUNT)
    row = (tl.program_id(0) - first).to(tl.int64)
    block = tl.program_id(1) * (SIZE // BLOCK) + tl.arange(0, SIZE // BLOCK)
    blocks = columns // BLOCK
    there = block < blocks
    scale = scale_of(absmax, code2, absmax2, offset, (row * blocks).to(tl.int32) + block, there, BLOCK2, NESTED)
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
    target = out.to(tl.pointer_type(tl.int32)) + tl.program_id(0).to(tl.int64) * (stride // 2)
    tl.store(target + pair, pairs, mask=there[:, None])


def _in_words(weights: Sequence[Held], out: torch.Tensor) -> bool:
    """Whether the fast kernel takes them: PTX is for NVIDIA's GPUs, and words must begin where words do."""
    places = (out.data_ptr(), 2 * out.stride(0), *(packed.data_ptr() for packed, _ in weights))
    return out.is_cuda and torch.version.hip is None and all(place % 16 == 0 for place in places)


def fits(state: Any, columns: int) -> bool:
    """Whether the kernel takes a weight with such rows, of this quantization state of bitsandbytes'."""
    block = state.blocksize
    whole = block & (block - 1) == 0 and columns % block == 0 and block <= COLUMNS
    return bool(whole and state.quant_type in ("nf4", "fp4") and (not state.nested or state.state2.absmax.ndim == 1))


def alike(weights: Sequence[Held]) -> bool:
    """Whether all are of 4 bits, and one kernel reads them: in blocks of the same size, by the same code books."""
    states = [state for _, state in weights]
    one_dtype = len({packed.dtype for packed, _ in weights}) == 1
    held = one_dtype and all(state is not None for state in states)
    return held and all(_same(a, b) for a, b in pairwise(states))


def _same(a: Any, b: Any) -> bool:
    if (a.blocksize, a.nested, a.absmax.dtype) != (b.blocksize, b.nested, b.absmax.dtype):
        return False
    nested = not a.nested or (a.state2.blocksize == b.state2.blocksize and torch.equal(a.state2.code, b.state2.code))
    return nested and torch.equal(a.code, b.code)


def rows_in(packed: torch.Tensor, columns: int) -> int:
    """Of a weight of so many columns, by its codes."""
    return packed.nbytes * 2 // columns


def arguments_of(weights: Sequence[Held], columns: int) -> tuple[list[Any], dict[str, Any]]:
    """For a kernel that reads weights which are alike, of so many columns: its first arguments, and constants."""
    arguments: list[Any] = []
    for packed, state in weights:
        outer, offset = (state.state2.absmax, state.offset) if state.nested else (state.absmax, state.absmax)
        arguments += (packed, state.absmax, outer, offset, rows_in(packed, columns))
    arguments += (None, None, None, None, 0) * (MOST - len(weights))
    state = weights[0][1]
    second = state.state2 if state.nested else None
    arguments += (state.code, second and second.code)
    blocks = {"BLOCK": state.blocksize, "BLOCK2": second.blocksize if second else 1, "NESTED": state.nested}
    return arguments, {"COUNT": len(weights), **blocks}


def dequantize_into(
    weights: Sequence[Held], out: torch.Tensor, size: int | None = None, warps: int | None = None
) -> None:
    """Write weights of 4 bits [rows, columns] that are alike, or one in 16 bits, one above the other into `out`, a
    matrix on their device, in any 16-bit dtype, whose rows may lie apart."""
    columns, (packed, state) = out.shape[1], weights[0]
    if state is None:
        out.copy_(packed)
    elif not by_triton(out):
        out.copy_(dequantized(weights, columns))
    elif _in_words(weights, out):
        arguments, constants = arguments_of(weights, columns)
        size = size or min(FAST_COLUMNS, max(power_of_2(columns), state.blocksize))
        launch(_fast_kernel, (len(out), ceil_div(columns, size)), *arguments, out, columns, out.stride(0), **constants,
            SIZE=size, EIGHT=_EIGHT[out.dtype], num_warps=warps or FAST_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    else:
        _one_by_one(weights, out, size or COLUMNS, warps or WARPS)


def _one_by_one(weights: Sequence[Held], out: torch.Tensor, size: int, warps: int) -> None:
    first, columns = 0, out.shape[1]
    for packed, state in weights:
        second = state.state2 if state.nested else None
        part = out[first : first + rows_in(packed, columns)]
        first += len(part)
        launch(_dequantize_kernel, (len(part), ceil_div(columns, size)),
            packed.view(torch.uint8), state.code, state.absmax,
            second.code if second else state.code, second.absmax if second else state.absmax,
            state.offset if second else state.code, part, columns, part.stride(0),
            BLOCK=state.blocksize, BLOCK2=second.blocksize if second else 1, NESTED=state.nested, SIZE=size,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def dequantized(weights: Sequence[Held], columns: int) -> torch.Tensor:
    """The reference, [rows of all, columns] in float32."""
    return torch.cat([_dequantized(packed, state, columns) for packed, state in weights])


def _dequantized(packed: torch.Tensor, state: Any, columns: int) -> torch.Tensor:
    scale = state.absmax
    if state.nested:
        outer = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: scale.numel()]
        scale = state.state2.code[scale.long()] * outer + state.offset
    codes = packed.view(torch.uint8).flatten()
    numbers = torch.stack([codes >> 4, codes & 15], 1).flatten()
    values: torch.Tensor = state.code[numbers.long()] * scale.repeat_interleave(state.blocksize)[: len(numbers)]
    return values.view(-1, columns)
