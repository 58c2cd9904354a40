"""Ways to hold the base's weights, one file each."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from qft.quant.hold.as_packed import AsPacked
from qft.quant.hold.base import Scheme
from qft.quant.hold.bnb_4bit import Bnb4Bit
from qft.quant.hold.bnb_8bit import Bnb8Bit
from qft.quant.hold.custom import Custom
from qft.quant.hold.none import Unquantized
from qft.quant.hold.plugin import load_plugin
from qft.quant.hold.prequantized import contradictions, mode, skipped_layers
from qft.quant.hold.qat import Qat
from qft.recipe.training import QuantSection

__all__ = ["SCHEMES", "AsPacked", "Qat", "Scheme", "contradictions", "find_scheme"]

SCHEMES: dict[str, Callable[[QuantSection, str, Sequence[str]], Scheme]] = {
    "none": Unquantized.of,
    "8bit": Bnb8Bit.of,
    "4bit": Bnb4Bit.of,
    "custom": Custom.of,
    "qat": Qat.of,
}
"""By quant.mode: of the section, the dtype of what is not quantized, and the names of the output heads."""
OF_CHECKPOINTS: dict[str, Callable[[Mapping[str, Any], str, Sequence[str]], Scheme]] = {
    "8bit": Bnb8Bit.of_checkpoint,
    "4bit": Bnb4Bit.of_checkpoint,
}
"""Those that a checkpoint may come in."""


def find_scheme(
    quant: QuantSection,
    checkpoint: Mapping[str, Any],
    dtype: str,
    heads: Sequence[str],
    packed: tuple[Collection[str], float] | None = None,
) -> Scheme:
    """How a model is held; `checkpoint` is the quantization_config of one that comes quantized, else empty; `packed`
    are the names, and the bits, of weights that stay as its files have them."""
    if not checkpoint:
        return SCHEMES[quant.mode](quant, dtype, heads)
    name = mode(checkpoint)
    if packed:
        return AsPacked.of(name, checkpoint, dtype, *packed)
    if name in OF_CHECKPOINTS:
        return OF_CHECKPOINTS[name](checkpoint, dtype, heads)
    plugin = load_plugin(Path(quant.plugin)) if quant.plugin else None
    return Scheme(name, dtype, skipped_layers(checkpoint, heads), plugin, checkpoint)
