"""Round to nearest: each group's extremes are the ends of its range, and no data is looked at."""

from typing import Any

from qft.quant.engines.base import Block, QuantizedLayer
from qft.quant.engines.compressed import CompressedTensors, global_scale, hold, weight_scales
from qft.quant.layer import siblings


class RoundToNearest(CompressedTensors):
    def quantize(self, block: Block) -> dict[str, QuantizedLayer]:
        quantized = {}
        for names in siblings(block.schemes):
            layers: list[Any] = [block.module.get_submodule(name) for name in names]
            whole = global_scale([layer.weight.data for layer in layers], block.schemes[names[0]])
            for name, layer in zip(names, layers, strict=True):
                scheme = block.schemes[name]
                scale, zero_point = weight_scales(layer.weight.data, scheme, whole)
                if (settled := (block.scales or {}).get(name)) is not None:
                    scale = settled.to(scale)
                quantized[name] = hold(layer, scheme, scale, zero_point, block.largest_inputs.get(name), whole)
        return quantized
