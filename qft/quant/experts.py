"""Parameters that hold the weights of all experts of a layer, [experts, a, b]: told by structure, not by names."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def expert_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Those of `model`, by name: of three dimensions, of a module that is not torch's own (a convolution's weight has
    three too), as many in a row as the configuration says that there are experts."""
    counts = _expert_counts(model.config.get_text_config().to_dict()) | _expert_counts(model.config.to_dict())
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if not counts or type(module).__module__.startswith("torch.nn"):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and parameter.shape[0] in counts and min(parameter.shape[1:]) > 1:
                found[f"{name}.{key}"] = parameter
    return found


def owner(parameter: str) -> str:
    """The module that a parameter of that name belongs to."""
    return parameter.rpartition(".")[0]


def _expert_counts(config: dict[str, Any]) -> set[int]:
    """Numbers in a configuration that may be of experts: one for all layers, or one a layer."""
    values = (value for key, value in config.items() if "expert" in key)
    numbers = (number for value in values for number in (value if isinstance(value, list) else [value]))
    return {number for number in numbers if isinstance(number, int) and number > 1}


def routers(model: PreTrainedModel) -> list[str]:
    """Modules beside experts that give each of these a score: [experts, hidden] weights."""
    stacks = expert_parameters(model)
    experts, width = {owner(name) for name in stacks}, model.config.get_text_config().hidden_size
    sizes = {f"{owner(owner(name))}.": (stack.shape[0], width) for name, stack in stacks.items()}
    found = []
    for name, module in model.named_modules():
        own = [tuple(parameter.shape) for parameter in module.parameters(recurse=False)]
        beside = (size for place, size in sizes.items() if name.startswith(place) and name not in experts)
        if any(size in own for size in beside):
            found.append(name)
    return found
