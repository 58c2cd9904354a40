"""What an engine of `qft calibrate` is given, and what it gives back: one block of the model at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from qft.quant.layer import LayerScheme

Tensors = dict[str, torch.Tensor]


@dataclass
class Block:
    """One block to quantize, as the unquantized model has it."""

    name: str
    """Within the model: model.layers.3"""
    module: nn.Module
    """On the device, in the dtype that it computes in; an engine may change it."""
    schemes: Mapping[str, LayerScheme]
    """Of each linear layer that is to be quantized, by its name within the block."""
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]] = ()
    """Arguments of the block for each window, unquantized; hidden states [1, tokens, hidden] come first."""
    quantized_inputs: Sequence[torch.Tensor] = ()
    """The same hidden states once the blocks before are quantized."""
    largest_inputs: Mapping[str, float] = field(default_factory=dict)
    """Largest magnitude that each layer with static activations was given."""
    scales: Mapping[str, torch.Tensor] | None = None
    """Of layers whose scales [out, groups] a training has learnt, in float32. None: there was none that was made for
    this format, and the engine rounds as it does."""
    iters: int = 0
    seed: int = 0


@dataclass(frozen=True)
class QuantizedLayer:
    """One linear layer as an engine holds it."""

    module: nn.Module
    """Computes what the layer will compute once it is loaded again."""
    tensors: Tensors
    """What is written, by names within the layer."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What the header of the safetensors file must tell of them, by names within the layer (`weight`, `bias`), which
    need not be names of `tensors`. `Engine.header` makes the header of it."""


class Engine(Protocol):
    """One way to quantize the linear layers of a model that is trained."""

    def quantize(self, block: Block) -> dict[str, QuantizedLayer]:
        """Each layer of block.schemes."""

    def restore(self, layer: nn.Linear, tensors: Tensors, scheme: LayerScheme) -> nn.Module:
        """The module of a QuantizedLayer from its tensors; `layer` is the unquantized one."""

    def config(self, schemes: Mapping[str, LayerScheme | None], dtype: torch.dtype) -> dict[str, Any]:
        """quantization_config of the result's config.json; `schemes` of every linear layer by its full name (the output
        head too), None for those in 16 bits; `dtype` in which the blocks were quantized. Raises ValueError for schemes
        that the format cannot hold in one model."""

    def header(self, metadata: Mapping[str, str], others: Sequence[str]) -> dict[str, str]:
        """What the header of a safetensors file must hold beside {"format": "pt"}; empty if nothing.

        `metadata` is that of the quantized layers in the file, by full names (<block>.<layer>.<name>); `others` are
        the full names of the tensors that belong to none. transformers adds the files' headers up in the order of their
        names, and the last word on a key holds: in the last file by name, it is that of all files together."""
        return {}


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """A linear layer that multiplies with `weight` [out, in], itself and no copy, and adds `bias` [out]."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.data, requires_grad=False)
    return made.eval()


def only_scheme(schemes: Mapping[str, LayerScheme | None]) -> LayerScheme:
    """The one scheme of all layers that have any. Raises ValueError where there is none, or a second."""
    kinds = {scheme for scheme in schemes.values() if scheme}
    if len(kinds) != 1:
        raise ValueError(f"this format holds all quantized layers of a model alike, not in {len(kinds)} ways")
    return kinds.pop()
