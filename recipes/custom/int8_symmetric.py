"""A quantizer of one's own, complete: int8 weights, one scale for each output channel, symmetric about zero.

    weight[o, i] ~ int8[o, i] * scale[o],   scale[o] = max_i |weight[o, i]| / 127

Training reads the dequantized weight, so gradients are exact for the weights that are held. docs/custom.md tells the
contract that this file keeps; change a copy of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

NAME = "int8_symmetric"
LEVELS = 127
SMALLEST = torch.finfo(torch.float32).tiny  # the scale of a row of zeros


@register_quantization_config(NAME)
@dataclass
class Int8SymmetricConfig(QuantizationConfigMixin):
    """What the config.json of a saved model says under quantization_config."""

    modules_to_not_convert: list[str] | None = None
    """Linear layers that stay as they are. None: the output head."""
    int8_matmul: bool = False
    """Without gradients, multiply int8 by int8 where the device can; activations are then rounded too."""
    quant_method: str = NAME


def quantize(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [n, k] of any float dtype -> int8 [n, k] and float32 scales [n]. NaN and infinity stay in the scales."""
    values = values.float()
    scale = (values.abs().amax(dim=1) / LEVELS).clamp(min=SMALLEST)
    return (values / scale[:, None]).round().to(torch.int8), scale


def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int8 [n, k] and float32 [n] -> [n, k], multiplied in float32 and rounded once."""
    return (weight * scale[:, None]).to(dtype)


def multiply_int8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [..., in] in int8, each token by its own scale, times int8 [out, in] -> [..., out], summed exactly in int32."""
    tokens, token_scale = quantize(x.flatten(0, -2))
    product = torch._int_mm(tokens, weight.t()).float() * token_scale[:, None] * scale
    return product.to(x.dtype).unflatten(0, x.shape[:-1])


def can_multiply_int8(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """What cuBLAS asks of torch._int_mm: more than 16 rows, and multiples of 8. The same is asked of a CPU."""
    rows = x.numel() // x.shape[-1]
    return x.device.type in ("cuda", "cpu") and rows > 16 and all(size % 8 == 0 for size in weight.shape)


class DequantizedMatmul(torch.autograd.Function):
    """x [..., in] times the dequantized weight [out, in], plus bias [out] or None. The weight is dequantized again for
    the gradient: a graph that kept it would hold the whole model in 16 bits."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: Any) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        return nn.functional.linear(x, dequantize(weight, scale, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
        return gradient @ dequantize(weight, scale, gradient.dtype), None, None, bias


class Int8Linear(nn.Linear):
    """weight int8 [out, in], weight_scale float32 [out], bias as it was. As an nn.Linear, peft puts LoRA on it."""

    def __init__(self, linear: nn.Linear, *, pre_quantized: bool, int8_matmul: bool) -> None:
        like, bias = linear.weight, linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias, device=like.device, dtype=like.dtype)
        # A buffer: transformers would let a float parameter train.
        self.register_buffer("weight_scale", torch.empty(self.out_features, dtype=torch.float32, device=like.device))
        self.int8_matmul = int8_matmul
        if pre_quantized:  # else the weight becomes int8 once it is there: transformers casts to what it finds here
            self.weight = nn.Parameter(torch.empty_like(like, dtype=torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], in the dtype of x or of autocast."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.int8_matmul and not torch.is_grad_enabled() and can_multiply_int8(x, self.weight):
            y = multiply_int8(x, self.weight, self.weight_scale)
            return y if bias is None else y + bias
        return DequantizedMatmul.apply(x, self.weight, self.weight_scale, bias)

    def dequantize(self) -> torch.Tensor:
        """The weight that forward multiplies with, float32 [out, in]."""
        return dequantize(self.weight, self.weight_scale, torch.float32)


class Int8Quantize(ConversionOps):
    """What transformers does to a weight as it loads an unquantized checkpoint."""

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, torch.Tensor]:
        """{NAME.weight: a float tensor [out, in], or a list of it} -> NAME.weight and NAME.weight_scale."""
        ((name, value),) = input_dict.items()
        weight, scale = quantize(value[0] if isinstance(value, list) else value)
        return {name: nn.Parameter(weight, requires_grad=False), f"{name}_scale": scale}


@register_quantizer(NAME)
class Int8SymmetricQuantizer(HfQuantizer):
    """Puts Int8Linear in place of every linear layer but those of modules_to_not_convert."""

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        config = self.quantization_config
        kept = self.get_modules_to_not_convert(model, config.modules_to_not_convert, model._keep_in_fp32_modules)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and should_convert_module(name, kept):
                layer = Int8Linear(module, pre_quantized=self.pre_quantized, int8_matmul=config.int8_matmul)
                model.set_submodule(name, layer)

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        module, tensor = get_module_from_name(model, param_name)
        return isinstance(module, Int8Linear) and tensor == "weight" and not self.pre_quantized

    def get_quantize_ops(self) -> ConversionOps:
        return Int8Quantize()

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
