"""int8 weights, alone or with activations rounded to int8 for each token, by torchao and in its own format; and int4
weights by groups of a row, a byte each, likewise, of a training that was made for them.

A weight is a tensor of a class of torchao's. What is written are the plain tensors that it is made of, and, in the
header of the safetensors file, what the class needs beside them: without the header nobody can put it together again.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)
from transformers import TorchAoConfig

from qft.quant.engines.base import Block, Engine, QuantizedLayer, Tensors, linear_of, only_scheme
from qft.quant.layer import LayerScheme, skip_entry
from qft.quant.rounding.integer import Integer

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # it is there
PLAIN = '{"_type": "Tensor"}'
"""What a header says of a tensor that is nothing but itself."""


class TorchAo(Engine):
    def quantize(self, block: Block) -> dict[str, QuantizedLayer]:
        held = {}
        for name, scheme in block.schemes.items():
            layer: Any = block.module.get_submodule(name)
            made = _quantized(layer, scheme, layer.weight.device)
            if block.scales is not None:
                _as_trained(made, layer.weight.data, scheme, block.scales.get(name))
            held[name] = _hold(made)
        return held

    def restore(self, layer: nn.Linear, tensors: Tensors, scheme: LayerScheme) -> nn.Module:
        quantized: nn.Linear = _quantized(layer, scheme, torch.device("meta"))
        _, header = flatten_tensor_state_dict({"layer.weight": quantized.weight})
        parts = {f"layer.{name}": part.to(layer.weight.device) for name, part in tensors.items() if name != "bias"}
        whole, _ = unflatten_tensor_state_dict(parts, header)
        quantized.weight = nn.Parameter(whole["layer.weight"], requires_grad=False)
        return quantized

    def config(self, schemes: Mapping[str, LayerScheme | None], dtype: torch.dtype) -> dict[str, Any]:
        names = list(schemes)
        # transformers compares with the names of parameters here, so an end of a name is an end of the parameter's.
        skipped = [skip_entry(name, names).replace("$", ".weight$") for name in names if schemes[name] is None]
        made: dict[str, Any] = TorchAoConfig(_settings(only_scheme(schemes)), modules_to_not_convert=skipped).to_dict()
        return made | {"quant_method": made["quant_method"].value}

    def header(self, metadata: Mapping[str, str], others: Sequence[str]) -> dict[str, str]:
        described = {**metadata, **dict.fromkeys(others, PLAIN)}
        return described | {"tensor_names": json.dumps(list(described))}


def _as_trained(made: Any, weight: torch.Tensor, scheme: LayerScheme, scale: torch.Tensor | None) -> None:
    """Put the integers and scales of the training in the place of torchao's, whose quotients are other ones."""
    codes, held = Integer(scheme.bits, scheme.group_size).codes(weight, scale)
    made.weight.qdata, made.weight.scale = codes, held


def _hold(quantized: Any) -> QuantizedLayer:
    state = {f"layer.{name}": tensor for name, tensor in quantized.state_dict().items()}
    tensors, header = flatten_tensor_state_dict(state)
    del header["tensor_names"]
    return QuantizedLayer(quantized, _within_layer(tensors), _within_layer(header))


def _within_layer(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("layer."): value for name, value in values.items()}


def _quantized(layer: nn.Linear, scheme: LayerScheme, device: torch.device) -> Any:
    """`layer` with its weight rounded on `device`; on meta, what a rounded weight is, without its values."""
    made = linear_of(layer.weight.data.to(device), layer.bias)
    quantize_(made, _settings(scheme))
    return made


def _settings(scheme: LayerScheme) -> Any:
    if scheme.bits == 4 and scheme.activations == "dynamic":
        return Int8DynamicActivationIntxWeightConfig(INT4, PerGroup(scheme.group_size))
    if scheme.bits == 4:
        return IntxWeightOnlyConfig(weight_dtype=INT4, granularity=PerGroup(scheme.group_size))
    # torchao would change settings of torch.compile for the whole process.
    if scheme.activations == "none":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
