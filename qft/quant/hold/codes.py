"""The weights of all experts of a layer in nf4 or fp4: each expert's as bitsandbytes has a linear layer's, 4-bit codes
in blocks of 64 that share a scale; with double quantization the scales of all of them together in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from bitsandbytes import functional as bnb
from torch._subclasses.fake_tensor import FakeTensor

from qft.quant.grouped import Read

BLOCK, NESTED_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one themselves."""


class Codes:
    """Weights [experts, a, b]."""

    def __init__(self, weight: torch.Tensor, quant_type: str, *, nested: bool) -> None:
        """Quantizes them on their device, one expert at a time."""
        experts, rows, columns = weight.shape
        self.shape, self.quant_type = (experts, rows, columns), quant_type
        device = weight.device
        self.codes = torch.empty(experts, -(-rows * columns // 2), dtype=torch.uint8, device=device)
        self.scales = torch.empty(experts, -(-rows * columns // BLOCK), dtype=torch.float32, device=device)
        self.book = bnb.get_4bit_type(quant_type, device="cpu").to(weight.device)
        self.nested: torch.Tensor | None = None
        """Scales of the scales' blocks, then what was taken off all of them."""
        empty = isinstance(weight, FakeTensor) or weight.is_meta
        for number in () if empty else range(experts):
            codes, state = bnb.quantize_4bit(weight[number].contiguous(), blocksize=BLOCK, quant_type=quant_type)
            self.codes[number], self.scales[number] = codes.flatten(), state.absmax
        if nested:
            self._nest(empty=empty)

    def _nest(self, *, empty: bool) -> None:
        count, device = -(-self.scales.numel() // NESTED_BLOCK), self.scales.device
        self.nested = torch.empty(count + 1, dtype=torch.float32, device=device)
        self.nested_book = torch.empty(256, dtype=torch.float32, device=device)
        if empty:
            self.scales = torch.empty(self.scales.shape, dtype=torch.uint8, device=device)
            return
        mean = self.scales.mean()
        self.scales, state = bnb.quantize_blockwise(self.scales - mean, blocksize=NESTED_BLOCK)
        self.nested_book, self.nested[:-1], self.nested[-1] = state.code, state.absmax, mean

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        own = ("codes", "scales", "book", *(("nested", "nested_book") if self.nested is not None else ()))
        return {name: getattr(self, name) for name in own}

    def reader(self, dtype: torch.dtype) -> Read:
        # Not a function within this one that calls itself: such a one, and with it the scales, is only freed when
        # Python looks for cycles.
        return partial(self._read, self._scales(), dtype)

    def _read(self, scales: torch.Tensor, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
        shape = self.shape[1:]
        # Else the last block of an expert is a short one.
        whole = math.prod(shape) % BLOCK == 0
        if stop - start > 1 and not whole:
            return torch.cat([self._read(scales, dtype, number, number + 1) for number in range(start, stop)])
        if isinstance(self.codes, FakeTensor):
            return torch.empty(stop - start, *shape, dtype=dtype, device=self.codes.device)
        made = torch.float32 if dtype == torch.float64 else dtype  # which it has no kernel for
        own = {"blocksize": BLOCK, "code": self.book, "quant_type": self.quant_type, "dtype": made}
        # On CPUs, bitsandbytes takes blocks of a matrix to end with its rows; those of a vector it reads right.
        count = torch.Size([(stop - start) * math.prod(shape)])
        state = bnb.QuantState(absmax=scales[start:stop].flatten(), shape=count, **own)
        weights: torch.Tensor = bnb.dequantize_4bit(self.codes[start:stop].reshape(-1, 1), state)
        return weights.view(-1, *shape).to(dtype)

    def _scales(self) -> torch.Tensor:
        """In float32, of all experts."""
        if self.nested is None:
            return self.scales
        if isinstance(self.scales, FakeTensor):
            return torch.empty_like(self.scales, dtype=torch.float32)
        own = {"absmax": self.nested[:-1], "code": self.nested_book, "blocksize": NESTED_BLOCK, "dtype": torch.float32}
        scales: torch.Tensor = bnb.dequantize_blockwise(self.scales, bnb.QuantState(**own))
        return scales.add_(self.nested[-1])
