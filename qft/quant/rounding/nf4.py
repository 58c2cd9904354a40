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


def nf4_traced(weight: torch.Tensor) -> Rounded:
    """Takes the memory that `nf4` does, of a weight without contents too: the library looks at numbers of its own."""
    blocks = -(-weight.numel() // 64)
    codes = weight.new_empty(-(-weight.numel() // 2), dtype=torch.uint8)
    largest = weight.new_empty(blocks, dtype=torch.float32)
    shifted = largest - 1
    held = weight.new_empty(blocks, dtype=torch.uint8)
    del shifted, largest
    largest = weight.new_empty(blocks, dtype=torch.float32)
    values = torch.empty_like(weight)
    del codes, held, largest
    return Rounded(values, None)
