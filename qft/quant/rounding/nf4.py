"""nf4 with double quantization (arXiv:2305.14314), by bitsandbytes itself, as its layers are made and read."""

import torch
from bitsandbytes import functional

from qft.quant.rounding.base import Rounded


def nf4(weight: torch.Tensor) -> Rounded:
    """Blocks of 64 weights, across rows; values are in the weight's dtype. The largest of a block is on the grid, so
    nothing is clipped."""
    codes, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return Rounded(functional.dequantize_4bit(codes, state).reshape(weight.shape), None)
