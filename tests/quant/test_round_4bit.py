"""4-bit codes on a CPU are those that bitsandbytes itself makes."""

from __future__ import annotations

import pytest
import torch

from qft.quant.round_4bit import round_4bit

QUANTIZE = torch.ops.bitsandbytes.quantize_4bit.default


def assert_theirs(weight: torch.Tensor, *how: object) -> None:
    theirs = QUANTIZE._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, weight, *how)
    for found, expected in zip(round_4bit(weight, *how), theirs, strict=True):  # type: ignore[arg-type]
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (3, 70001), (1, 63), (5, 13), (2, 64, 32)])
def test_codes_and_scales_are_theirs(shape: tuple[int, ...], dtype: torch.dtype, quant_type: str) -> None:
    """Of random weights and of values half-way between codes, of all zeros and of what is no number."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes = torch.tensor([-1.0, -0.6962, -0.5251, 0.0, 0.0796, 0.1609, 1.0])
    weight.view(-1)[:6] = ((codes[1:] + codes[:-1]) / 2).to(dtype)
    for blocksize in (32, 64):
        assert_theirs(weight, blocksize, quant_type, torch.uint8)
        for value in (0.0, float("inf"), float("nan")):
            odd = weight.clone()
            odd.view(-1)[-40:] = value
            assert_theirs(odd, blocksize, quant_type, torch.uint8)
    if shape == (64, 64):
        assert_theirs(weight, 64, quant_type, torch.bfloat16)


def test_it_is_what_bitsandbytes_rounds_with() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::quantize_4bit", "CPU")
