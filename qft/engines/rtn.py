"""Round to nearest: each group's extremes are the ends of its range, and no data is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qft.engines import compressed
from qft.engines.base import Block, Held, LayerScheme, Tensors

__all__ = ["RoundToNearest"]


class RoundToNearest:
    def needs_windows(self, scheme: LayerScheme) -> bool:
        return scheme.activations == "static"

    def quantize(self, block: Block) -> dict[str, Held]:
        held = {}
        for name, scheme in block.schemes.items():
            layer: Any = block.module.get_submodule(name)
            scales = compressed.weight_scales(layer.weight.data, scheme)
            held[name] = compressed.hold(layer, scheme, *scales, block.largest_inputs.get(name))
        return held

    def restore(self, layer: nn.Linear, tensors: Tensors, scheme: LayerScheme) -> nn.Module:
        return compressed.restore(layer, tensors, scheme)

    def config(self, schemes: Mapping[str, LayerScheme | None], dtype: torch.dtype) -> dict[str, Any]:
        return compressed.config(schemes)

    def header(self, held: Mapping[str, str], others: Sequence[str]) -> dict[str, str]:
        return {}
