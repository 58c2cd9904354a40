"""nf4 and fp4 by bitsandbytes (arXiv:2305.14314): blocks of 64 weights, a 4-bit code each and one scale."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
from torch import nn

from qft.recipe.schema import QuantSection

__all__ = ["Bnb4Bit"]


class Bnb4Bit:
    def config(self, quant: QuantSection, compute_dtype: str, heads: list[str]) -> dict[str, Any]:
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quant.quant_type,
            "bnb_4bit_use_double_quant": quant.double_quant,
            "bnb_4bit_compute_dtype": compute_dtype,
            "bnb_4bit_quant_storage": quant.quant_storage,
            "llm_int8_skip_modules": [*heads, *quant.skip_modules],
        }

    def after_load(self, model: nn.Module) -> None:
        # On CPUs with AVX512-BF16 the first evaluation forward repacks the weights in place, and every later training
        # step then reads them in the wrong order: LoRA gradients are wrong without a word.
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False
