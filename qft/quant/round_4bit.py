"""nf4 and fp4 on a CPU, bit for bit as bitsandbytes rounds to them, in less than half of the time: its search for the
code of a weight (bucketize) goes on where a comparison says, which a processor guesses wrong half of the time, and
took most of the loading of a model. Fifteen comparisons of whole vectors guess nothing."""

import functools

import bitsandbytes as bnb
import torch
from torch.library import register_kernel

CHUNK = 2**16
"""Weights compared at once: they and what is counted of them fit into a core's cache."""


def round_4bit(
    weight: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two codes a byte, [items of the storage, 1], and a float32 scale for each `blocksize` weights in a row."""
    flat = weight.reshape(-1).float()
    whole = flat.numel() - flat.numel() % blocksize
    blocks, rest = flat[:whole].view(-1, blocksize), flat[whole:]
    scales = blocks.abs().max(dim=-1)[0]
    scaled = (blocks * (1.0 / scales.clamp(min=1e-38).view(-1, 1))).clamp_(-1, 1).view(-1)
    if rest.numel():
        scale = rest.abs().max().clamp(min=1e-38)
        scales, scaled = torch.cat([scales, scale[None]]), torch.cat([scaled, torch.clamp(rest / scale, -1, 1)])
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    codes = _codes(scaled, quant_type)
    packed = ((codes[::2] << 4) | codes[1::2])[:, None]
    return packed if quant_storage == torch.uint8 else packed.squeeze().view(quant_storage)[:, None], scales


def _codes(scaled: torch.Tensor, quant_type: str) -> torch.Tensor:
    """uint8: as many bounds as are not above a value, all for NaN; of fp4, whose codes are in no order, the code
    there."""
    bounds, order = _bounds(quant_type)
    counts = torch.full(scaled.shape, len(bounds), dtype=torch.uint8)
    within = torch.empty(min(CHUNK, scaled.numel()), dtype=torch.bool)
    for start in range(0, scaled.numel(), CHUNK):
        values, count = scaled[start : start + CHUNK], counts[start : start + CHUNK]
        for bound in bounds:
            count -= torch.le(values, bound, out=within[: len(values)]).view(torch.uint8)
    return counts if quant_type == "nf4" else order[counts.int()]


@functools.cache
def _bounds(quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Half-way between neighbours of the code book; and the codes, as uint8, by their values."""
    values, order = bnb.functional.get_4bit_type(quant_type, device="cpu").sort()
    return (values[:-1] + values[1:]) / 2, order.to(torch.uint8)


if not torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::quantize_4bit", "CPU"):
    register_kernel("bitsandbytes::quantize_4bit", "cpu")(round_4bit)
