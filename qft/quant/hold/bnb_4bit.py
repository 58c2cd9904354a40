"""nf4 and fp4 by bitsandbytes (arXiv:2305.14314): blocks of 64 weights, a 4-bit code each and one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from qft.quant.hold.base import Scheme
from qft.quant.hold.codes import Codes
from qft.quant.hold.prequantized import BNB_KEYS, skipped_layers
from qft.quant.layer import LayerScheme
from qft.quant.product import Store
from qft.recipe.training import QuantSection

BLOCK = 64
"""Weights that share a scale."""
NESTED_BLOCK = 256
"""Scales that share one themselves, with double quantization."""
CODES, NESTED_CODES = 2**4, 2**8
"""Entries of the code books, in float32: each layer has its own."""


@dataclass(frozen=True)
class Bnb4Bit(Scheme):
    """4 bits."""

    engine = "bitsandbytes"
    quant_type: str = "nf4"
    double_quant: bool = True
    compute_dtype: str = "float32"
    quant_storage: str = "uint8"
    """Dtype of the tensors that the codes are packed in."""

    @classmethod
    def of(cls, quant: QuantSection, dtype: str, heads: Sequence[str]) -> Bnb4Bit:
        skipped = (*heads, *quant.named_skips)
        compute = dtype if quant.compute_dtype == "auto" else quant.compute_dtype
        own = (quant.quant_type, quant.double_quant, compute, quant.quant_storage)
        return cls("4bit", dtype, skipped, None, {}, *own)

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any], dtype: str, heads: Sequence[str]) -> Bnb4Bit:
        """As a checkpoint's own quantization config has it; what that leaves out is bitsandbytes' default."""
        defaults = {"quant_type": "fp4", "double_quant": False, "compute_dtype": "float32", "quant_storage": "uint8"}
        own: dict[str, Any] = {name: config.get(BNB_KEYS[name], value) for name, value in defaults.items()}
        return cls("4bit", dtype, skipped_layers(config, heads), checkpoint=config, **own)

    @property
    def layer(self) -> LayerScheme:
        return LayerScheme(self.quant_type, 4, double_quant=self.double_quant)

    @property
    def weight_format(self) -> str:
        return "bnb-4bit"

    def short_words(self) -> str:
        return f"4 bits ({self.quant_type})"

    def details(self) -> list[str]:
        double = ["double quantization"] if self.double_quant else []
        return [f"4bit {self.quant_type}", *double, f"computed in {self.compute_dtype}"]

    def config(self) -> dict[str, Any]:
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": self.compute_dtype,
            "bnb_4bit_quant_storage": self.quant_storage,
            "llm_int8_skip_modules": list(self.skipped),
        }

    def settle(self, model: nn.Module) -> None:
        # On CPUs with AVX512-BF16 the first evaluation forward repacks the weights in place, and every later training
        # step then reads them in the wrong order: LoRA gradients are wrong without a word.
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False

    def misfits(self, model: nn.Module) -> list[str]:
        layers = ((name, m) for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit))
        return [name for name, layer in layers if not _fits(layer)]

    def weight_bytes(self, rows: int, columns: int) -> int:
        packed: int = getattr(torch, self.quant_storage).itemsize
        blocks = _ceil(rows * columns, BLOCK)
        codes = _ceil(rows * columns, 2 * packed) * packed + 4 * CODES
        if not self.double_quant:
            return codes + 4 * blocks
        # 8 bits a scale, a float32 scale of theirs for each of their blocks, and the mean that was taken off them.
        return codes + blocks + 4 * _ceil(blocks, NESTED_BLOCK) + 4 * NESTED_CODES + 4

    def stack(self, weight: torch.Tensor) -> Store:
        return Codes(weight, self.quant_type, nested=self.double_quant)

    @property
    def product_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.compute_dtype)
        return dtype

    def stand_in(self, rows: int, columns: int, bias: nn.Parameter | None) -> nn.Linear:
        layer = _StandIn(
            *(columns, rows, bias is not None),
            compute_dtype=getattr(torch, self.compute_dtype),
            compress_statistics=self.double_quant,
            quant_type=self.quant_type,
            quant_storage=getattr(torch, self.quant_storage),
            device="meta",
        )
        layer.bias = bias
        return layer


class _StandIn(bnb.nn.Linear4bit):  # type: ignore[misc]
    """Such a layer on tensors without contents."""

    stands_in = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (self.out_features, self.in_features)
        cast, nested = x.to(self.compute_dtype), self.weight.compress_statistics
        out: torch.Tensor = _Product.apply(cast, shape, nested)  # type: ignore[no-untyped-call]
        return (out if self.bias is None else out + self.bias.to(out.dtype)).to(x.dtype)


class _Product(torch.autograd.Function):
    """x [..., columns] times a weight [rows, columns] that is dequantized for it, and again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: tuple[int, int], nested: bool) -> torch.Tensor:
        ctx.shape, ctx.nested = shape, nested
        weight = _dequantized(shape, x.dtype, nested)
        return torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return torch.matmul(gradient, _dequantized(ctx.shape, gradient.dtype, ctx.nested)), None, None


def _dequantized(shape: tuple[int, int], dtype: torch.dtype, nested: bool) -> torch.Tensor:
    scales = torch.empty(_ceil(shape[0] * shape[1], BLOCK), dtype=torch.float32) if nested else None
    weight = torch.empty(shape, dtype=dtype)
    del scales
    return weight


Bnb4Bit.stand_in_class = _StandIn


def _fits(layer: Any) -> bool:
    """Whether codes, scales and what is noted of them are those of a weight of the layer's shape."""
    state, count = layer.weight.quant_state, layer.out_features * layer.in_features
    if state is None or tuple(state.shape) != (layer.out_features, layer.in_features):
        return False
    codes, scales = layer.weight.nbytes == _ceil(count, 2), state.absmax.numel() == _ceil(count, state.blocksize)
    return bool(codes and scales and state.nested == (state.absmax.dtype == torch.uint8))


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
