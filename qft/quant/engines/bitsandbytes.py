"""nf4 and fp4 (arXiv:2305.14314), and LLM.int8() (arXiv:2208.07339), by bitsandbytes and in its own format.

Layers are the library's own, and what is written is their state_dict, as transformers writes it. LLM.int8() rounds
weights by way of float16, and multiplies the columns in which any activation is above its threshold in float16.
"""

from collections.abc import Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from qft.quant.engines.base import Block, Engine, QuantizedLayer, Tensors, only_scheme
from qft.quant.layer import LayerScheme, skip_entry


class BitsAndBytes(Engine):
    def quantize(self, block: Block) -> dict[str, QuantizedLayer]:
        return {name: _hold(block.module.get_submodule(name), scheme) for name, scheme in block.schemes.items()}

    def restore(self, layer: nn.Linear, tensors: Tensors, scheme: LayerScheme) -> nn.Module:
        device = layer.weight.device
        weight = tensors["weight"].to(device)
        made: nn.Linear = _unfilled(layer, scheme)
        if scheme.data_type == "int":
            scales = tensors["SCB"].to(device)
            made.weight = bnb.nn.Int8Params(weight, requires_grad=False, SCB=scales).to(device)
        else:
            state = {name: tensor for name, tensor in tensors.items() if name.startswith("weight.")}
            made.weight = bnb.nn.Params4bit.from_prequantized(weight, state, device=device, module=made)
        return made

    def config(self, schemes: Mapping[str, LayerScheme | None], dtype: torch.dtype) -> dict[str, Any]:
        scheme = only_scheme(schemes)
        settings: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": scheme.threshold}
        if scheme.data_type != "int":
            settings = {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": scheme.data_type,
                "bnb_4bit_use_double_quant": scheme.double_quant,
                "bnb_4bit_compute_dtype": dtype,
            }
        skipped = [skip_entry(name, list(schemes)) for name, scheme in schemes.items() if scheme is None]
        made: dict[str, Any] = BitsAndBytesConfig(**settings, llm_int8_skip_modules=skipped).to_dict()
        return made | {"quant_method": made["quant_method"].value}


def _hold(layer: Any, scheme: LayerScheme) -> QuantizedLayer:
    made, device = _unfilled(layer, scheme), layer.weight.device
    if scheme.data_type == "int":
        # bitsandbytes rounds on the way from the host to the device, and weights that are there already not at all.
        made.weight = bnb.nn.Int8Params(layer.weight.data.cpu(), requires_grad=False).to(device)
    else:
        settings = {"compress_statistics": scheme.double_quant, "quant_type": scheme.data_type, "module": made}
        made.weight = bnb.nn.Params4bit(layer.weight.data, **settings).to(device)
    return QuantizedLayer(made, {name: _unshared(tensor) for name, tensor in made.state_dict().items()})


def _unfilled(layer: nn.Linear, scheme: LayerScheme) -> Any:
    """A layer of bitsandbytes in the place of `layer`, with its bias; the weight is still to be set."""
    shape, place = (layer.in_features, layer.out_features, False), {"device": torch.device("meta")}
    if scheme.data_type == "int":
        made = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=scheme.threshold, **place)
    else:
        made = bnb.nn.Linear4bit(*shape, compute_dtype=layer.weight.dtype, quant_type=scheme.data_type, **place)
        # On CPUs with AVX512-BF16 the first forward would repack the weights in place; see qft/quant/hold/bnb_4bit.py.
        made.support_avx512bf16_for_cpu = False
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    return made.eval()


def _unshared(tensor: torch.Tensor) -> torch.Tensor:
    """A plain tensor that shares its memory with nothing: layers share one code book, and safetensors refuses that."""
    return tensor.detach().as_subclass(torch.Tensor).clone()
