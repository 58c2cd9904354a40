"""What the formats that are deployed make of a weight, so that a training can see it: one file a family."""

from dataclasses import dataclass

from qft.quant.layer import LayerScheme
from qft.quant.rounding.base import Rounded, Rounding, straight_through
from qft.quant.rounding.ggml import BLOCK, q4_0, q8_0
from qft.quant.rounding.integer import Integer, Scaled, dynamic_int8
from qft.quant.rounding.mx import mxfp4
from qft.quant.rounding.nf4 import nf4

__all__ = ["TARGETS", "Rounded", "Rounding", "Scaled", "Target", "straight_through"]


@dataclass(frozen=True)
class Target:
    """A format that weights are trained for."""

    rounding: Rounding
    """Of the linear layers that are held in few bits."""
    block: int
    """Weights that rows must be whole multiples of; 1: rows of any length."""
    form: str
    """The name in export.target under which it is written."""
    layer: LayerScheme | None = None
    """How the engine that writes it holds a layer; None: it is no engine of `qft calibrate`."""
    ends: Rounding | None = None
    """Of embeddings and output head; None: they stay as they are."""
    inputs: Rounding | None = None
    """Of what those layers multiply their weights with; None: it stays as it is."""


def _integer(bits: int, group_size: int = -1, activations: str = "none") -> Target:
    scheme = LayerScheme("int", bits, group_size, activations=activations)
    inputs = dynamic_int8 if activations == "dynamic" else None
    return Target(Integer(bits, group_size), max(group_size, 1), "compressed-tensors", scheme, inputs=inputs)


TARGETS: dict[str, Target] = {
    **{f"int4-g{size}": _integer(4, size) for size in (32, 64, 128)},
    "int8": _integer(8),
    "w8a8": _integer(8, activations="dynamic"),
    "int8-dynamic-act-int4-weight": _integer(4, 32, activations="dynamic"),
    "mxfp4": Target(mxfp4, BLOCK, "compressed-tensors", LayerScheme("float", 4, BLOCK)),
    "nf4": Target(nf4, 1, "bnb-4bit", LayerScheme("nf4", 4)),
    "q4_0": Target(q4_0, BLOCK, "gguf-q4_0", ends=q8_0),
    "q8_0": Target(q8_0, BLOCK, "gguf-q8_0", ends=q8_0),
}
"""By quant.target."""
