"""The values that a loaded layer multiplies with, whichever library holds it."""

from typing import Any

import bitsandbytes as bnb
import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qft.quant.stacked import Stacked


def is_quantized(linear: nn.Module) -> bool:
    """Whether the layer is held by bitsandbytes, by a plugin or as its files have it, and so takes inputs of any
    dtype."""
    return isinstance(linear.weight, bnb.nn.Params4bit | bnb.nn.Int8Params | Stacked) or hasattr(linear, "dequantize")


def dequantized_weight(linear: Any) -> torch.Tensor:
    """The weight [out, in] of a linear layer, as its library dequantizes it; of an unquantized one as it is."""
    weight: torch.Tensor = linear.weight.detach()
    if hasattr(linear, "dequantize"):  # a plugin's
        weight = linear.dequantize().detach()
    elif isinstance(weight, Stacked):
        weight = weight.view_of.whole()
    elif is_quantized(linear):
        weight = dequantize_bnb_weight(linear.weight, state=getattr(linear, "state", None))
    elif is_traceable_wrapper_subclass(weight):  # torchao's
        weight = linear.weight.dequantize()
    return weight
