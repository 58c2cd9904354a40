"""Blocks of 32 weights with a float16 scale, as gguf-py makes them and llama.cpp reads them (quantize_row_q4_0_ref and
quantize_row_q8_0_ref of ggml-quants.c); and blocks of 256 as qft makes them. Values are float32."""

import torch

from qft.quant.rounding import q4_k as k_blocks
from qft.quant.rounding.base import Rounded, divided

BLOCK, K_BLOCK = 32, k_blocks.BLOCK
AT_ONCE = 2**24
"""Weights, of which q8_0 rounds no more at a time."""


def q4_0(weight: torch.Tensor) -> Rounded:
    """4 bits from -8 to 7: the weight of the largest magnitude is -8; one as large of the other sign is clipped."""
    blocks = _blocks(weight)
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = extreme / -8
    raised = (blocks * _inverse(scale)).add_(8.5).trunc_()
    inside = (raised <= 15).flatten(-2)
    return _scaled(raised.clamp_(0, 15).sub_(8), scale, inside)


def q8_0(weight: torch.Tensor) -> Rounded:
    """8 bits from -127 to 127, a half rounded away from zero: nothing is clipped. An output head is rounded so, the
    largest weight of a model, and hence in parts: what is made on the way takes many times its bytes."""
    if weight.numel() <= AT_ONCE:
        return _q8_0(weight)
    values = torch.empty_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
    rows = max(AT_ONCE // weight.shape[-1], 1)
    for part, made in zip(*(torch.split(each.flatten(0, -2), rows) for each in (weight, values)), strict=True):
        made.copy_(_q8_0(part).values)
    return Rounded(values, None)


def _q8_0(weight: torch.Tensor) -> Rounded:
    blocks = _blocks(weight)
    scale = divided(blocks.abs().amax(-1, keepdim=True), 127)
    quotients = blocks * _inverse(scale)
    size = quotients.abs()
    whole = size.floor()
    rest = size.sub_(whole).mul_(2).floor_()
    return _scaled(whole.add_(rest).copysign_(quotients), scale, None)


def q4_k(weight: torch.Tensor) -> Rounded:
    """4 bits from 0 to 15 above the least of 32 weights. Scales and minima are rounded to 6 bits, so the ends of the
    range may be clipped."""
    made = k_blocks.q4_k(weight.float())
    return Rounded(made.values(), made.inside.flatten(-3))


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    return weight.float().reshape(*weight.shape[:-1], -1, BLOCK)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)


def _scaled(codes: torch.Tensor, scale: torch.Tensor, inside: torch.Tensor | None) -> Rounded:
    """A scale that float16 cannot hold is zero, or infinite: then there is nothing, or nothing finite. `codes` become
    the values: one tensor less of a whole weight in float32."""
    held = scale.half().float()
    return Rounded(codes.mul_(held).masked_fill_(held == 0, 0).flatten(-2), inside)
