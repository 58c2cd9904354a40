"""Products in float8 (e4m3): rows of activations and gradients, each with a scale (rounding.py), times weights with one
scale, summed in float32. Scales are powers of two, times what is another in each step (Dither), and what is infinite
becomes NaN."""

# Triton reads annotations, which must be no strings.

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from qft.kernels.dequantize import Held, arguments_of, dequantized, pick, rows_in, scale_of, which
from qft.kernels.jit import by_triton, ceil_div, jit, launch, power_of_2, tl

E4M3 = torch.float8_e4m3fn
SUMMED_TO = (torch.bfloat16,)
"""The dtypes of what it takes the place of."""
MULTIPLE = 16
"""Of rows and columns, as tensor cores take them."""
LARGEST = 7
"""Exponent that the largest number is brought to: 128 to 256 of 448."""
SPAN = 4096
"""Columns of a row at once."""
TILE = 128, 64
"""Rows and columns of a weight that is turned."""
ADD = 32, 256, 4
"""Rows, columns, and how often, of what is added by one program."""
WIDEST = 256
"""Columns that a kernel takes of what is multiplied and added; a program's shared memory has room for no more."""
FAST = True
"""Whether tensor cores may add up in less than float32."""


def power_for(most: torch.Tensor) -> torch.Tensor:
    """The scale of numbers of which that is the largest, in float32."""
    exponent = (torch.frexp(most.float()).exponent - 1 - LARGEST).clamp_min(-126).where(most > 0, -126)
    return torch.ldexp(torch.ones_like(most, dtype=torch.float32), exponent)


def largest(weight: torch.Tensor, state: Any) -> torch.Tensor:
    """A bound of what a weight holds, of 4 bits if it has a quantization state."""
    if state is None:
        return weight.abs().amax()
    scale = state.absmax
    if state.nested:
        outer = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: scale.numel()]
        scale = state.state2.code[scale.long()] * outer + state.offset
    bound: torch.Tensor = scale.abs().amax() * state.code.abs().amax()
    return bound


@dataclass
class Factor:
    """Of a product's two scales, what is the same for all rows."""

    weight: float = 1.0
    """The scale of the weight."""
    dither: float = 1.0
    """What each row's power of two is multiplied with."""


@dataclass
class Dither:
    """What scales are multiplied with. What is frozen would be rounded to the same in each step, and adapters learn
    what the rounded weights lack; rounded otherwise each time, they are right in the mean, and so are inputs that are
    nearly the same for all tokens. Of the sequence R2 (Roberts, "The unreasonable effectiveness of quasirandom
    sequences", 2018)."""

    step: int = 0
    """Of the training."""

    def of(self, number: int, part: int) -> float:
        """Of the matrix of that number: 1 to 2. `part`: of its weights (0), of inputs (1) or of gradients (2)."""
        return float(2 ** ((self.step * 0.7548776662466927 + (3 * number + part) * 0.5698402909980532) % 1))


def _book() -> str:
    """PTX: the code book, a number of it in each lane of a warp, behind the last operand (dequantize.py)."""
    return (
        ".reg .b32 lane, at; .reg .b64 offset, place; .reg .f32 book; .reg .b16 low, high; .reg .f32 n0, n1, n2, n3;\n"
        "mov.u32 lane, %laneid; and.b32 lane, lane, 15; mul.wide.u32 offset, lane, 4; add.s64 place, {}, offset;\n"
        "ld.global.nc.f32 book, [place];"
    )


def _number(register: int, code: int, shift: int, scale: int) -> str:
    return (
        f"shr.u32 at, ${code}, {shift}; shfl.sync.idx.b32 n{register}, book, at, 31, 0xffffffff; "
        f"mul.rn.f32 n{register}, n{register}, ${scale};"
    )


def _four(out: int) -> str:
    """n0 to n3 as one word."""
    first, second = (f"cvt.rn.satfinite.e4m3x2.f32 {to}, n{b}, n{a};" for to, a, b in (("low", 0, 1), ("high", 2, 3)))
    return f"{first} {second} mov.b32 ${out}, {{low, high}};"


SHIFTS = tuple(8 * byte + nibble for byte in range(4) for nibble in (4, 0))
"""Of eight codes in a word, in the order of their columns."""


def _straight() -> str:
    """From eight codes in $2, a scale in $3, and the book at $4: eight numbers in $0 and $1."""
    lines = [_book().format("$4")]
    for word in range(2):
        lines += [_number(i, 2, SHIFTS[4 * word + i], 3) for i in range(4)] + [_four(word)]
    return "\n".join(["{", *lines, "}"])


def _turned() -> str:
    """From eight codes of each of four rows in $8 to $11, their scales in $12 to $15, and the book at $16: the four
    numbers of each of eight columns in $0 to $7."""
    lines = [_book().format("$16")]
    for column in range(8):
        lines += [_number(row, 8 + row, SHIFTS[column], 12 + row) for row in range(4)] + [_four(column)]
    return "\n".join(["{", *lines, "}"])


STRAIGHT, TURNED = _straight(), _turned()


@jit
def _codes_kernel(  # type: ignore[no-untyped-def]
    p0, a0, o0, f0, m0, p1, a1, o1, f1, m1, p2, a2, o2, f2, m2, p3, a3, o3, f3, m3, code, code2, out, columns, inverse,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, BLOCK2: tl.constexpr, NESTED: tl.constexpr,
    SIZE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Row program_id(0), columns from program_id(1) * SIZE on. Of each weight: codes, absmax, absmax of that, offset,
    rows."""
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
    scales = tl.broadcast_to((scale * inverse)[:, None], (SIZE // BLOCK, BLOCK // 8))
    book = code.to(tl.int64) + tl.zeros_like(codes)
    a, b = tl.inline_asm_elementwise(
        ASM, "=r,=r,r,r,l", [codes, scales, book], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )
    fours = tl.reshape(tl.join(a, b), (SIZE // BLOCK, BLOCK // 4))
    place = block[:, None] * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
    target = out.to(tl.pointer_type(tl.int32)) + tl.program_id(0).to(tl.int64) * (columns // 4)
    tl.store(target + place, fours, mask=there[:, None])


@jit
def _codes_turned_kernel(  # type: ignore[no-untyped-def]
    p0, a0, o0, f0, m0, p1, a1, o1, f1, m1, p2, a2, o2, f2, m2, p3, a3, o3, f3, m3, code, code2, out, columns, stride,
    inverse, COUNT: tl.constexpr, BLOCK: tl.constexpr, BLOCK2: tl.constexpr, NESTED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """ROWS rows, COLUMNS columns of one block, written as COLUMNS rows `stride` apart: four rows become a word."""
    number, begin = which(tl.program_id(0), tl.cdiv(m0, ROWS), tl.cdiv(m1, ROWS), tl.cdiv(m2, ROWS), COUNT)
    packed, absmax = pick(number, p0, p1, p2, p3, COUNT), pick(number, a0, a1, a2, a3, COUNT)
    absmax2, offset = pick(number, o0, o1, o2, o3, COUNT), pick(number, f0, f1, f2, f3, COUNT)
    rows = pick(number, m0, m1, m2, m3, COUNT)
    out += pick(number, 0, m0, m0 + m1, m0 + m1 + m2, COUNT)
    four = (tl.program_id(0) - begin) * (ROWS // 4) + tl.arange(0, ROWS // 4)
    there = four * 4 < rows
    column = tl.program_id(1) * COLUMNS
    row = four.to(tl.int64) * 4
    number = ((row * columns + column) // BLOCK).to(tl.int32)
    source = packed.to(tl.pointer_type(tl.int32)) + (row * (columns // 8) + column // 8)[:, None]
    source += tl.arange(0, COLUMNS // 8)[None, :]
    blocks, words, within = columns // BLOCK, columns // 8, there[:, None]
    s0 = scale_of(absmax, code2, absmax2, offset, number, there, BLOCK2, NESTED)
    s1 = scale_of(absmax, code2, absmax2, offset, number + blocks, there, BLOCK2, NESTED)
    s2 = scale_of(absmax, code2, absmax2, offset, number + 2 * blocks, there, BLOCK2, NESTED)
    s3 = scale_of(absmax, code2, absmax2, offset, number + 3 * blocks, there, BLOCK2, NESTED)
    c0 = tl.load(source, mask=within, other=0)
    c1 = tl.load(source + words, mask=within, other=0)
    c2 = tl.load(source + 2 * words, mask=within, other=0)
    c3 = tl.load(source + 3 * words, mask=within, other=0)
    like = tl.zeros((ROWS // 4, COLUMNS // 8), dtype=tl.float32)
    book = code.to(tl.int64) + tl.zeros_like(c0)
    o0, o1, o2, o3, o4, o5, o6, o7 = tl.inline_asm_elementwise(
        ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r,l",
        [c0, c1, c2, c3, (s0 * inverse)[:, None] + like, (s1 * inverse)[:, None] + like,
         (s2 * inverse)[:, None] + like, (s3 * inverse)[:, None] + like, book],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    words = stride // 4
    eight = (column + 8 * tl.arange(0, COLUMNS // 8)).to(tl.int64)[None, :] * words
    target = out.to(tl.pointer_type(tl.int32)) + eight + four[:, None]
    tl.store(target, o0, mask=within)
    tl.store(target + words, o1, mask=within)
    tl.store(target + 2 * words, o2, mask=within)
    tl.store(target + 3 * words, o3, mask=within)
    tl.store(target + 4 * words, o4, mask=within)
    tl.store(target + 5 * words, o5, mask=within)
    tl.store(target + 6 * words, o6, mask=within)
    tl.store(target + 7 * words, o7, mask=within)


@jit
def _half_kernel(  # type: ignore[no-untyped-def]
    weight, out, rows, columns, weight_stride, stride, inverse,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """The same for a weight of 16 bits, turned or not."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there = (row < rows) & (column < columns)
    value = tl.load(weight + row * weight_stride + column, mask=there, other=0).to(tl.float32) * inverse
    target = out + column.to(tl.int64) * stride + row if TURN else out + row * stride + column
    tl.store(target, value.to(tl.float8e4nv), mask=there)


def write(weights: Sequence[Held], out: torch.Tensor, scale: float, *, turned: bool) -> None:
    """Weights of 4 bits that are alike, or one of 16, one above the other and divided by `scale` into `out`, in float8:
    [rows, columns], one row behind the other, or `turned` [columns, rows], whose rows may lie apart."""
    if isinstance(out, FakeTensor):
        return
    columns, rows = out.shape if turned else out.shape[::-1]
    inverse, (tall, wide) = 1 / scale, TILE
    weight, state = weights[0]
    if not by_triton(out):
        whole = weight.data if state is None else dequantized(weights, columns)
        found = whole.to(torch.promote_types(whole.dtype, torch.float32)) / scale
        out.copy_(found.t() if turned else found)
        return
    if state is None:
        grid = (ceil_div(rows, tall), ceil_div(columns, wide))
        launch(_half_kernel, grid, weight, out, rows, columns, weight.stride(0), out.stride(0), inverse,
            ROWS=tall, COLUMNS=wide, TURN=turned,
        )  # fmt: skip
        return
    given, constants = arguments_of(weights, columns)
    if turned:
        wide = min(wide, state.blocksize)
        programs = sum(ceil_div(rows_in(packed, columns), tall) for packed, _ in weights)
        launch(_codes_turned_kernel, (programs, columns // wide),
            *given, out, columns, out.stride(0), inverse, **constants, ROWS=tall, COLUMNS=wide, ASM=TURNED, num_warps=4,
        )  # fmt: skip
    else:
        size = min(SPAN, max(power_of_2(columns), state.blocksize))
        launch(_codes_kernel, (rows, ceil_div(columns, size)),
            *given, out, columns, inverse, **constants, SIZE=size, ASM=STRAIGHT, num_warps=2,
        )  # fmt: skip


def multiply(rows: Any, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x Wᵀ [rows, others] in `dtype`, for `rows` (rounding.Rounded) and W [others, columns] in float8."""
    x, scales = rows.numbers, rows.scales
    if isinstance(x, FakeTensor):  # which stands for one on a GPU
        return x.new_empty(len(x), len(weight), dtype=dtype)
    if not x.is_cuda:
        wide = torch.promote_types(dtype, torch.float32)
        made: torch.Tensor = ((x.to(wide) @ weight.to(wide).t()) * scales).to(dtype)
        return made
    ones = _ones(len(weight), x.device)
    made = torch._scaled_mm(x, weight.t(), scales, ones, out_dtype=torch.bfloat16, use_fast_accum=FAST)
    return made.to(dtype)


@cache
def _ones(count: int, device: torch.device) -> torch.Tensor:
    """Scales of a weight's rows, which those of the other matrix hold already."""
    return torch.ones(1, count, device=device)


@jit
def _add_kernel(  # type: ignore[no-untyped-def]
    out, x, narrow, rows, columns, out_stride, x_stride, narrow_row, narrow_column,
    RANK: tl.constexpr, LINES: tl.constexpr, SIZE: tl.constexpr, TIMES: tl.constexpr,
):  # fmt: skip
    """SIZE columns of LINES rows, and of the next ones, TIMES in all."""
    column = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    place, within = tl.arange(0, RANK), column < columns
    other = tl.load(
        narrow + place[:, None] * narrow_row + column.to(tl.int64)[None, :] * narrow_column,
        mask=within[None, :], other=0,
    )  # fmt: skip
    for i in tl.static_range(TIMES):
        row = ((tl.program_id(1) * TIMES + i) * LINES + tl.arange(0, LINES)).to(tl.int64)
        there = row < rows
        tile = tl.load(x + row[:, None] * x_stride + place[None, :], mask=there[:, None], other=0)
        product = tl.dot(tile, other, input_precision="ieee")
        target, mask = out + row[:, None] * out_stride + column[None, :], there[:, None] & within[None, :]
        total = tl.load(target, mask=mask, other=0).to(tl.float32) + product
        tl.store(target, total.to(out.dtype.element_ty), mask=mask)


def taken(rank: int) -> int:
    """Columns that a kernel takes at once, of a matrix that is so wide."""
    return max(16, power_of_2(rank))


@dataclass
class Added:
    """x N, which is to be added to an output."""

    x: torch.Tensor
    """[rows, border]."""
    narrow: torch.Tensor
    """N [border, columns]."""
    rank: int
    """Columns of x and rows of N that are other than 0."""
    half: int = 0
    """As many of them are what the first half of N's columns has, and the next ones what the second has; 0: each may
    have all."""

    def fits(self, out: torch.Tensor) -> bool:
        """Whether a kernel may add it."""
        return self.rank > 0 and by_triton(out) and taken(self.rank) <= min(WIDEST, self.x.shape[1])

    def to(self, out: torch.Tensor) -> torch.Tensor:
        """`out` [rows, columns] with the sum in its place."""
        if not self.fits(out):
            return out.addmm_(self.x, self.narrow) if self.rank else out
        grid = (ceil_div(out.shape[1], ADD[1]), ceil_div(len(out), ADD[0] * ADD[2]))
        launch(_add_kernel, grid, out, self.x, self.narrow, *out.shape, out.stride(0), self.x.stride(0),
            *self.narrow.stride(),
            RANK=taken(self.rank), LINES=ADD[0], SIZE=ADD[1], TIMES=ADD[2], num_warps=4, num_stages=1,
        )  # fmt: skip
        return out
