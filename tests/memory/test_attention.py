"""Stand-ins of attention's kernels, beside what torch itself says that those allocate."""

from __future__ import annotations

import pytest
import torch

from qft.memory.attention import attention


@pytest.mark.parametrize("by_heads", [True, False])
def test_an_output_lies_as_the_kernel_has_it(*, by_heads: bool) -> None:
    """Where it lies by heads, models copy it, and both are kept."""
    shape, order = (2, 4, 24, 16), (0, 2, 1, 3)
    real = torch.zeros(shape) if by_heads else torch.zeros([shape[i] for i in order]).transpose(1, 2)
    real = real.to(torch.bfloat16)
    q = real.to("meta")
    masked = attention(real, real, real, torch.ones(24, 24, dtype=torch.bool))
    unmasked = attention(real, real, real)
    flash = torch.ops.aten._scaled_dot_product_flash_attention(q, q, q)[0]
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention(q, q, q, None, True)[0]
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention(q, q, q, None, True)[0]
    assert unmasked.stride() == flash.stride() == cudnn.stride()
    assert masked.stride() == efficient.stride()
