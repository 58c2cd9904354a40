"""What an adapter in peft's layout adds to the parameters of a mixture's experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper

from qft.checkpoint.skeleton import without_contents
from qft.plan import ModelPlan
from qft.quant.beside import factors
from qft.quant.grouped import Read
from qft.quant.product import Factors


@dataclass(frozen=True)
class Target:
    """A parameter [experts, a, b] that has an adapter."""

    name: str
    experts: int
    scaling: float
    transposed: bool
    """Whether it is [experts, in, out]."""

    def factors(self, parts: Mapping[str, torch.Tensor]) -> Factors:
        """Of peft's lora_A and lora_B."""
        pair = (parts["lora_A"].float(), parts["lora_B"].float())
        return factors(*pair, self.experts, self.scaling, transposed=self.transposed)


def targets(plan: ModelPlan, config: Mapping[str, Any]) -> dict[str, Target]:
    """Those that `config`, the fields of peft.LoraConfig, names, by the names that peft has for their layers: it wraps
    one into the other where a module has several."""
    if not config.get("target_parameters"):
        return {}
    known = LoraConfig.__dataclass_fields__
    own = {name: value for name, value in config.items() if name in known and name not in ("peft_type", "auto_mapping")}
    with torch.device("meta"):
        model = without_contents(plan.checkpoint, plan.recipe.model)
        adapted: Any = get_peft_model(model, LoraConfig(**{**own, "init_lora_weights": False}))
    return dict(_targets(adapted.get_base_model()))


def _targets(model: Any) -> Iterator[tuple[str, Target]]:
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper) and module.get_param().ndim == 3:
            own = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
            transposed = not module._did_swap_in_out_features
            yield name, Target(own, module.num_experts, module.scaling["default"], transposed)


def merged_stack(weight: torch.Tensor, read: Read, delta: Factors | None, dtype: torch.dtype) -> torch.Tensor:
    """Weights [experts, a, b] as `read` has them, with what is added, in `dtype` on the host: one expert at a time."""
    out = torch.empty(weight.shape, dtype=dtype)
    for number in range(len(weight)):
        own = read(number, number + 1)[0].float()
        if delta:
            left, right = delta.left[number].to(own.device), delta.right[number].to(own.device)
            own = own + delta.scaling * (left @ right)
        out[number] = own.to(dtype)
    return out
