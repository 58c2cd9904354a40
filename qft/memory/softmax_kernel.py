"""softmax.gradient_in_torch as one kernel: z is read twice and written once, and nothing else is held.

Imported only where there is a GPU: Triton is no dependency elsewhere."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 8192


def gradient_by_kernel(z: torch.Tensor, classes: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    """A Gradient of contiguous z in float32, bfloat16 or float16."""
    rows, width = z.shape
    losses = torch.empty(rows, dtype=torch.float32, device=z.device)
    if rows:
        block = min(triton.next_power_of_2(width), BLOCK)
        kernel: Any = _kernel
        warps = 16 if block >= BLOCK else 4
        kernel[(rows,)](
            z, classes, losses, z.stride(0), width, scale, cap or 1.0, cap is not None, block, num_warps=warps
        )
    return losses


@triton.jit
def _logits(z, scale, cap, capped: tl.constexpr):  # type: ignore[no-untyped-def]
    x = z * scale
    if capped:
        # tanh, of which the language has none of its own: exact at both ends.
        e = tl.exp(-2 * tl.abs(x) / cap)
        x = tl.where(x < 0, -cap, cap) * ((1 - e) / (1 + e))
    return x


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    z, classes, losses, stride, width, scale, cap, capped: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    true = tl.load(classes + row)
    most = tl.full((block,), float("-inf"), tl.float32)
    total = tl.zeros((block,), tl.float32)
    for start in range(0, width, block):
        at = start + tl.arange(0, block)
        x = _logits(tl.load(z + at, mask=at < width, other=0.0).to(tl.float32), scale, cap, capped)
        x = tl.where(at < width, x, float("-inf"))
        new = tl.maximum(most, x)
        # Where nothing but minus infinity was seen, it would be less itself; what is no number is left to spread.
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(most - base) + tl.exp(x - base)
        most = new
    highest = tl.max(most, 0)
    logsum = highest + tl.log(tl.sum(total * tl.exp(most - highest), 0))
    own = _logits(tl.load(z + true).to(tl.float32), scale, cap, capped)
    tl.store(losses + row, logsum - own)
    tl.debug_barrier()
    for start in range(0, width, block):
        at = start + tl.arange(0, block)
        x = _logits(tl.load(z + at, mask=at < width, other=0.0).to(tl.float32), scale, cap, capped)
        share = tl.exp(x - logsum) - tl.where(at == true, 1.0, 0.0)
        if capped:
            share *= 1 - (x / cap) * (x / cap)
        tl.store(z + at, (share * scale).to(z.dtype.element_ty), mask=at < width)
