"""LoRA on experts' parameters, computed beside them: peft itself adds it to the weights of all experts at each step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from qft.quant.product import Factors, View, Whole
from qft.quant.stacked import Stacked


def compute_beside(model: nn.Module) -> None:
    """Have what peft puts on experts' parameters [experts, a, b] of `model` computed so. The layers stay peft's own,
    under their names; their `forward` alone is another."""
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):  # peft's disable_input_dtype_casting asks each of its layers
            module.cast_input_dtype_enabled = False
        if isinstance(module, ParamWrapper) and module.get_param().ndim == 3:
            vars(module)["forward"] = _Beside(module)


class _Beside:
    """What an adapted layer does in the place of its own forward."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wrapper, experts = self.wrapper, self.wrapper.get_base_layer()
        active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
        if wrapper.disable_adapters or wrapper.merged or len(active) != 1:
            return type(wrapper).forward(wrapper, *args, **kwargs)
        weight = experts._parameters[wrapper.parameter_name]
        view = weight.view_of if isinstance(weight, Stacked) else View(Whole(weight), weight.dtype)
        # What the code of the experts finds under that name, until it has run.
        vars(experts)[wrapper.parameter_name] = Stacked(replace(view, factors=_factors(wrapper, active[0])))
        try:
            return wrapper.base_layer(*args, **kwargs)
        finally:
            del vars(experts)[wrapper.parameter_name]


def _factors(wrapper: Any, adapter: str) -> Factors:
    weights = (wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight)
    own = (wrapper.num_experts, wrapper.scaling[adapter])
    return factors(*weights, *own, transposed=not wrapper._did_swap_in_out_features)


def factors(lora_a: Any, lora_b: Any, experts: int, scaling: float, *, transposed: bool) -> Factors:
    """Of peft's A [r * experts, in] and B [out, r * experts], for weights [experts, out, in], or, `transposed`,
    [experts, in, out]."""
    a = lora_a.reshape(experts, -1, lora_a.shape[-1])
    b = lora_b.reshape(lora_b.shape[0], -1, experts).permute(2, 0, 1)
    return Factors(a.mT, b.mT, scaling) if transposed else Factors(b, a, scaling)
