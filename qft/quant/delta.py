"""LoRA's update added to a weight: W + s B A (arXiv:2106.09685), with DoRA (arXiv:2402.09353) scaled to the learnt
magnitudes. A merge and a forward pass that multiplies with the merged weight come to the same bits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def merged(
    weight: torch.Tensor,
    scaling: float,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weight [out, in] of a linear layer with its adapter, A [r, in], B [out, r] and DoRA's magnitudes [out]: in
    float32 on the weight's device, whatever precision products around it have."""
    device = weight.device
    with torch.autocast(device.type, enabled=False), _exact_products():
        delta = scaling * (lora_b.to(device, torch.float32) @ lora_a.to(device, torch.float32))
        return add_delta(weight, delta, magnitude)


def add_delta(weight: torch.Tensor, delta: torch.Tensor, magnitude: torch.Tensor | None = None) -> torch.Tensor:
    """Weight [out, in] of a linear layer with LoRA's delta [out, in], in float32; with DoRA its rows are scaled to the
    learnt magnitudes [out]."""
    changed = weight.float() + delta.to(weight.device, torch.float32)
    if magnitude is None:
        return changed
    scale: torch.Tensor = magnitude.to(weight.device, torch.float32) / torch.linalg.vector_norm(changed, dim=1)
    return changed * scale[:, None]


@contextmanager
def _exact_products() -> Iterator[None]:
    """Without TensorFloat-32."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before
