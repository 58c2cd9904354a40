"""Round to nearest: each group's extremes are the ends of its range, and no data is looked at."""

from typing import Any

from qft.quant.engines.base import Block, QuantizedLayer
from qft.quant.engines.compressed import CompressedTensors, hold, weight_scales


class RoundToNearest(CompressedTensors):
    def quantize(self, block: Block) -> dict[str, QuantizedLayer]:
        quantized = {}
        for name, scheme in block.schemes.items():
            layer: Any = block.module.get_submodule(name)
            scales = weight_scales(layer.weight.data, scheme)
            quantized[name] = hold(layer, scheme, *scales, block.largest_inputs.get(name))
        return quantized
