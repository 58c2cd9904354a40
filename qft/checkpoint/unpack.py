"""The numbers that packed tensors stand for, in float32 unless said otherwise: one function a layout, each from tensors
by their names within the layer. On tensors without contents they tell the shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

Parts = Mapping[str, torch.Tensor]
FLOATS_OF_4_BITS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""E2M1, by code."""
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of 32 bits AWQ has each of eight numbers."""


def integers(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """`count` unsigned numbers of so many bits, the lowest first, in each row of words [..., n] in int32: int32."""
    if 32 % bits == 0:
        each = words[..., None] >> torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        return each.bitwise_and_(2**bits - 1).flatten(-2)[..., :count]
    start = torch.arange(count, device=words.device) * bits
    place, shift = start // 32, start % 32
    wide = words.long() & 0xFFFFFFFF
    over = wide[..., (place + 1).clamp(max=words.shape[-1] - 1)] << (32 - shift)
    found: torch.Tensor = ((wide[..., place] >> shift) | over) & (2**bits - 1)
    return found.int()


def spread(scale: torch.Tensor, shape: Sequence[int], blocks: Sequence[int] = ()) -> torch.Tensor:
    """Scales of a tensor of this shape, one for all, for a row, or for each block, as a factor of it. `blocks` are the
    sizes of blocks in the last dimensions; without them they are as large as they can be. Raises ValueError for scales
    of another number."""
    scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim < len(shape):
        scale = scale.view(*scale.shape, *[1] * (len(shape) - scale.ndim))
    sizes = dict(zip(range(-len(blocks), 0), blocks, strict=True))
    for dim, wanted in enumerate(shape):
        has = scale.shape[dim]
        if has in (1, wanted):
            continue
        size = sizes.get(dim - len(shape)) or -(-wanted // has)
        if -(-wanted // size) != has:
            raise ValueError(f"scales are {list(scale.shape)} for {list(shape)}")
        scale = scale.repeat_interleave(size, dim).narrow(dim, 0, wanted)
    return scale


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """E8M0: of bytes, 2 ** (byte - 127)."""
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - 127)


def floats_of_4_bits(codes: torch.Tensor) -> torch.Tensor:
    """Two of each byte [..., n], the lower half first: [..., 2n] in bfloat16, which has them all."""
    book = torch.tensor(FLOATS_OF_4_BITS, dtype=torch.bfloat16, device=codes.device)
    both = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return book[both.int()]


def scaled(parts: Parts, blocks: Sequence[int] = ()) -> torch.Tensor:
    """int8 or float8 `weight` times `scale`, of bytes a power of two; `zero_point` is taken off before."""
    weight, scale = parts["weight"].float(), parts["scale"]
    if "zero_point" in parts:
        weight = weight - spread(parts["zero_point"], weight.shape, blocks)
    return weight * spread(powers_of_two(scale) if scale.dtype == torch.uint8 else scale, weight.shape, blocks)


def packed_integers(parts: Parts, shape: tuple[int, int], bits: int, group: int | None) -> torch.Tensor:
    """compressed-tensors' pack-quantized, [out, in]: `packed` along in, `zero_point` along out, both with an offset."""
    half, rows = 2 ** (bits - 1), shape[0]
    numbers = integers(parts["packed"], bits, shape[1]) - half
    scale: torch.Tensor = parts["scale"].float()
    if (zero := parts.get("zero_point")) is not None:
        zero = integers(zero.T, bits, rows).T - half if zero.dtype == torch.int32 else zero
    if (order := parts.get("g_idx")) is not None:
        numbers = numbers - (zero[:, order.long()] if zero is not None else 0)
        return torch.mul(numbers, scale[:, order.long()])
    blocks = () if group is None else (1, group)
    if zero is not None:
        numbers = numbers - spread(zero, shape, blocks)
    return torch.mul(numbers, spread(scale, shape, blocks))


def packed_floats(parts: Parts) -> torch.Tensor:
    """compressed-tensors' 4-bit floats, [out, in]: mxfp4, or with a `global_scale` nvfp4."""
    values = floats_of_4_bits(parts["packed"]).float()
    if "global_scale" in parts:
        scale = parts["scale"].float() / parts["global_scale"].float()
    else:
        scale = powers_of_two(parts["scale"])
    return values * spread(scale, values.shape)


def gpt_oss(parts: Parts) -> torch.Tensor:
    """mxfp4 of gpt-oss: `blocks` [..., out, n, 16] with a power of two each, as [..., in, out] in bfloat16, exactly."""
    values = floats_of_4_bits(parts["blocks"]) * powers_of_two(parts["scales"]).bfloat16()[..., None]
    return values.flatten(-2).mT.contiguous()


def gptq(parts: Parts, bits: int, group: int, *, first: bool) -> torch.Tensor:
    """[out, in] of `qweight`, packed along in; `first`: zeros are less by one in files of the first version."""
    words, scales = parts["qweight"], parts["scales"].float()
    columns = len(parts["g_idx"]) if "g_idx" in parts else words.shape[0] * 32 // bits
    bits = words.shape[0] * 32 // columns
    numbers = integers(words.T, bits, columns)
    zeros = (integers(parts["qzeros"], bits, scales.shape[1]) + first) & (2**bits - 1)
    size = group if group > 0 else columns
    order = parts["g_idx"].long() if "g_idx" in parts else torch.arange(columns, device=words.device) // size
    made: torch.Tensor = (numbers - zeros.T[:, order]) * scales.T[:, order]
    return made


def bnb_4bit(parts: Parts, state: Mapping[str, Any]) -> torch.Tensor:
    """nf4 or fp4 of bitsandbytes, the upper half of a byte first; `state` is what the file notes of it."""
    scale, count = parts["absmax"], math.prod(state["shape"])
    if "nested_absmax" in parts:
        outer = parts["nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(scale)]
        scale = parts["nested_quant_map"][scale.int()] * outer + state["nested_offset"]
    codes = parts["weight"].flatten().view(torch.uint8)
    values = parts["quant_map"][torch.stack([codes >> 4, codes & 15], -1).flatten()[:count].int()]
    return (values * scale.repeat_interleave(state["blocksize"])[:count]).view(*state["shape"])


def bnb_8bit(parts: Parts) -> torch.Tensor:
    """LLM.int8(): of each row's largest, 127ths."""
    return parts["weight"] * (parts["SCB"].float() / 127)[:, None]


def awq(parts: Parts, bits: int) -> torch.Tensor:
    """[out, in] of `qweight` [in, out / 8], packed along out in AWQ's order."""
    scales = parts["scales"].float()
    rows = scales.shape[1]
    order = torch.arange(rows, device=scales.device).view(-1, 8)[:, list(AWQ_ORDER)].flatten()
    numbers = integers(parts["qweight"], bits, rows)[:, order]
    zeros = integers(parts["qzeros"], bits, rows)[:, order] if "qzeros" in parts else torch.full_like(scales, 8)
    size = -(-len(numbers) // len(scales))
    made = (numbers - zeros.repeat_interleave(size, 0)) * scales.repeat_interleave(size, 0)
    return made.T.contiguous()


def torchao(parts: Parts) -> torch.Tensor:
    """[out, in] of `qdata` in int8 or float8, times `scale`, one for all, for a row or for each group of it."""
    codes, others = parts["qdata"], parts.keys() - {"qdata", "scale", "zero_point"}
    if codes.dtype not in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2) or others:
        kind = ", ".join([str(codes.dtype).removeprefix("torch."), *sorted(others)])
        raise ValueError(f"it lies as a kernel of torchao's wants it ({kind}), and not in int8 or float8")
    return scaled({"weight": codes, **{name: part for name, part in parts.items() if name != "qdata"}})


def hqq(parts: Parts, shape: Sequence[int], bits: int, *, floats: bool) -> torch.Tensor:
    """[out, in] of `W_q`, whose bytes (of 3 bits: words of 32) hold numbers of as many equal parts of it, the first in
    the highest bits; `scale` and `zero` are for a row or a column of that. `floats`: they are said to be floats."""
    words = parts["W_q"]
    if floats:
        words = words.view(torch.int32 if bits == 3 else torch.uint8)
    each = 10 if bits == 3 else 8 // bits
    shifts = range(bits * (each - 1), -1, -bits)
    numbers = torch.cat([(words >> shift) & (2**bits - 1) for shift in shifts])[: math.prod(shape) // words.shape[1]]
    return ((numbers - parts["zero"].float()) * parts["scale"].float()).reshape(*shape)
