"""What the formats that are deployed make of a weight, so that a training can see it: one file a family."""

from dataclasses import dataclass

from qft.quant.layer import LayerScheme
from qft.quant.rounding.base import Rounded, Rounding, largest_of, sharing, straight_through, with_scale
from qft.quant.rounding.float4 import MX_BLOCK, NV_BLOCK, mxfp4, nvfp4
from qft.quant.rounding.ggml import BLOCK, K_BLOCK, q4_0, q4_k, q8_0
from qft.quant.rounding.integer import Integer, Scaled, dynamic_int8, static_int8
from qft.quant.rounding.nf4 import nf4, nf4_traced
from qft.quant.rounding.torchao import asymmetric_int8

__all__ = [
    "TARGETS", "Integer", "Rounded", "Rounding", "Scaled", "Target", "largest_of", "sharing", "static_int8",
    "straight_through", "with_scale",
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A format that weights are trained for."""

    rounding: Rounding
    """Of the linear layers that are held in few bits."""
    block: int
    """Weights that rows must be whole multiples of; 1: rows of any length."""
    form: str
    """The name in export.target under which it is written."""
    also: tuple[str, ...] = ()
    """Other forms that hold the very weights."""
    layer: LayerScheme | None = None
    """How the engine that writes it holds a layer; None: it is no engine of `qft calibrate`."""
    ends: Rounding | None = None
    """Of embeddings and output head; None: they stay as they are."""
    inputs: Rounding | None = None
    """Of what those layers multiply their weights with; None: it stays as it is."""
    observes: bool = False
    """Whether these are multiplied in 8 bits, by the largest of them that was seen."""
    dtype: str | None = None
    """The only one in which the engine gives weights back, whatever the model's; None: it is the model's."""
    traced: Rounding | None = None
    """What takes the memory of `rounding` with tensors that have no contents, where that does not."""
    shares: bool = False
    """Whether `rounding` takes a second argument, the largest magnitude [] of the weights of all layers of a module:
    those have one scale of the whole tensor together."""


def _integer(bits: int, group_size: int = -1, activations: str = "none") -> Target:
    scheme = LayerScheme("int", bits, group_size, activations=activations)
    inputs, observes = dynamic_int8 if activations == "dynamic" else None, activations == "static"
    rounding, block = Integer(bits, group_size), max(group_size, 1)
    # torchao rounds activations by other scales: see 8da4w.
    also = ("torchao",) if activations == "none" else ()
    return Target(rounding, block, "compressed-tensors", also, scheme, inputs=inputs, observes=observes)


def _float4(rounding: Rounding, block: int, *, shares: bool = False) -> Target:
    scheme = LayerScheme("float", 4, block)
    return Target(rounding, block, "compressed-tensors", layer=scheme, dtype="bfloat16", shares=shares)


TARGETS: dict[str, Target] = {
    **{f"int4-g{size}": _integer(4, size) for size in (32, 64, 128)},
    "int8": _integer(8),
    "w8a8": _integer(8, activations="dynamic"),
    "w8a8-static": _integer(8, activations="static"),
    "int8-dynamic-act-int4-weight": _integer(4, 32, activations="dynamic"),
    "8da4w": Target(
        Integer(4, 32), 32, "torchao", layer=LayerScheme("int", 4, 32, activations="dynamic"), inputs=asymmetric_int8
    ),
    "mxfp4": _float4(mxfp4, MX_BLOCK),
    "nvfp4": _float4(nvfp4, NV_BLOCK, shares=True),
    "nf4": Target(nf4, 1, "bnb-4bit", layer=LayerScheme("nf4", 4), traced=nf4_traced),
    "q4_0": Target(q4_0, BLOCK, "gguf-q4_0", ends=q8_0),
    "q4_k": Target(q4_k, K_BLOCK, "gguf-q4_k", ends=q8_0),
    "q8_0": Target(q8_0, BLOCK, "gguf-q8_0", ends=q8_0),
}
"""By quant.target."""
