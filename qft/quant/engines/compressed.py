"""Linear layers in the compressed-tensors format, which vLLM, SGLang and transformers read.

Arithmetic and layout are the library's own, so that a layer computes here what it computes once it is loaded again.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import set_forward_quantized
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import nn

from qft.quant.engines.base import Engine, QuantizedLayer, Tensors
from qft.quant.layer import LayerScheme


class CompressedTensors(Engine, Protocol):
    """What the engines that write this format have in common."""

    def restore(self, layer: nn.Linear, tensors: Tensors, scheme: LayerScheme) -> nn.Module:
        return _restore(layer, tensors, scheme)

    def config(self, schemes: Mapping[str, LayerScheme | None], dtype: torch.dtype) -> dict[str, Any]:
        """The quantization_config of config.json. Raises ValueError for zero points beside a second scheme.
        transformers (5.24) makes no room for packed zero points and refuses them, but for a model that says
        `dequantize`: that one it unpacks as it loads it, and then it takes all layers for the first group's."""
        kinds = sorted({scheme for scheme in schemes.values() if scheme}, key=repr)
        with_zero_points = not all(scheme.symmetric for scheme in kinds)
        if with_zero_points and len(kinds) > 1:
            raise ValueError("layers with zero points cannot be mixed with layers of another scheme")
        groups = {}
        for number, scheme in enumerate(kinds):
            arguments = _arguments(scheme)
            if len(kinds) > 1:
                arguments.targets = [f"re:^{re.escape(name)}$" for name, kind in schemes.items() if kind == scheme]
            arguments.format = infer_module_format(nn.Linear, arguments).value
            groups[f"group_{number}"] = arguments
        formats = {str(arguments.format) for arguments in groups.values()}
        made: dict[str, Any] = QuantizationConfig(
            config_groups=groups,
            format=formats.pop() if len(formats) == 1 else "mixed-precision",
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=[name for name, scheme in schemes.items() if scheme is None],
        ).model_dump(mode="json")
        return made | ({"dequantize": True} if with_zero_points else {})


def global_scale(weights: Sequence[torch.Tensor], scheme: LayerScheme) -> torch.Tensor | None:
    """Of a scheme with a scale for the whole tensor [1], in float32: the one of all these together."""
    if not is_nv(scheme):
        return None
    largest = torch.stack([weight.float().abs().amax() for weight in weights]).amax()
    made: torch.Tensor = generate_gparam(-largest, largest)
    return made


def weight_scales(
    weight: torch.Tensor, scheme: LayerScheme, whole: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points [out, groups] by which each group's extremes are the ends of the range; scales in the
    weight's dtype, of 4-bit floats in float32. `whole` is their `global_scale`."""
    rows = weight.float()
    size = scheme.group_size if scheme.group_size > 0 else rows.shape[1]
    groups = rows.view(len(rows), -1, size)
    low, high = groups.amin(-1), groups.amax(-1)
    scale, zero_point = calculate_qparams(low, high, _arguments(scheme).weights, whole)
    # Powers of two are written as exponents, of which float16 has too few.
    return scale if _is_float4(scheme) else scale.to(weight.dtype), zero_point


def hold(
    layer: nn.Linear,
    scheme: LayerScheme,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    largest_input: float | None = None,
    whole: torch.Tensor | None = None,
) -> QuantizedLayer:
    """Round the weights of `layer` to these scales and zero points, both [out, groups]; `whole` is their
    `global_scale`."""
    arguments = _arguments(scheme)
    # In 16 bits quotients would be rounded twice, and not alike on a CPU and by the library's kernels for GPUs.
    weight = layer.weight.data.float()
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point.to(torch.int8)}
    if whole is not None:
        state["weight_global_scale"] = whole.clone()  # of several layers: a file wants one each
    compressed = _compressor(arguments).compress(state, arguments)
    if scheme.activations == "static":
        if largest_input is None:
            raise ValueError("static activations need the largest input")
        limit = torch.tensor([largest_input], dtype=torch.float32, device=scale.device)
        input_scale, _ = calculate_qparams(-limit, limit, arguments.input_activations)
        compressed["input_scale"] = input_scale.to(scale.dtype)
    if layer.bias is not None:
        compressed["bias"] = layer.bias.data
    tensors = {name: tensor.contiguous() for name, tensor in compressed.items()}
    return QuantizedLayer(_restore(layer, tensors, scheme), tensors)


def _restore(layer: nn.Linear, tensors: Tensors, scheme: LayerScheme) -> nn.Module:
    """A linear layer with the dequantized weights, which rounds its inputs as the scheme says."""
    arguments = _arguments(scheme)
    state = {name: tensor.to(layer.weight.device) for name, tensor in tensors.items()}
    weight = _compressor(arguments).decompress(state, arguments)["weight"].to(layer.weight.dtype)
    made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = layer.bias
    if scheme.activations != "none":
        made.quantization_scheme = arguments
        made.quantization_status = QuantizationStatus.COMPRESSED
        if scheme.activations == "static":
            made.input_scale = nn.Parameter(state["input_scale"], requires_grad=False)
        set_forward_quantized(made)
    return made


def _arguments(scheme: LayerScheme) -> QuantizationScheme:
    strategy, size = ("channel", None) if scheme.group_size < 0 else ("group", scheme.group_size)
    settings: dict[str, Any] = {}
    if is_nv(scheme):
        strategy, settings = "tensor_group", {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
    elif _is_float4(scheme):
        settings = {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
    weights = QuantizationArgs(
        num_bits=scheme.bits,
        type=scheme.data_type,
        symmetric=scheme.symmetric,
        strategy=strategy,
        group_size=size,
        **settings,
    )
    inputs = None
    if scheme.activations != "none":
        dynamic = scheme.activations == "dynamic"
        strategy = "token" if dynamic else "tensor"
        inputs = QuantizationArgs(num_bits=8, type=scheme.data_type, strategy=strategy, dynamic=dynamic)
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)


def _is_float4(scheme: LayerScheme) -> bool:
    """nvfp4, or mxfp4: floats of 4 bits, with a power of two for each group."""
    return scheme.data_type == "float" and scheme.bits == 4


def is_nv(scheme: LayerScheme) -> bool:
    """nvfp4: a float8 for each group of 16, and a float32 for the tensor."""
    return _is_float4(scheme) and scheme.group_size == 16


def _compressor(arguments: QuantizationScheme) -> Any:
    return BaseCompressor.get_value_from_registry(infer_module_format(nn.Linear, arguments).value)
