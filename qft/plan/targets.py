"""What adapters are kept from: modules beside the language part, which text never reaches, unless the recipe asks for
them; layers that are called linear and do not compute a product alone; and what peft could not load again."""

import re
from collections.abc import Iterator, Sequence

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from qft.checkpoint.bypassed import bypassed_linears
from qft.checkpoint.language import beside_language
from qft.machine.device import Device
from qft.recipe.section import Problem
from qft.recipe.training import AdapterSection

MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Model types of which peft adapts no `out_proj`."""
DECOMPOSED = ("pissa", "olora", "loftq")
Excluded = str | list[str] | None
"""exclude_modules of peft.LoraConfig: a pattern of whole names, or names and ends of names."""


def exclusion(adapter: AdapterSection, model: PreTrainedModel) -> Excluded:
    """What of the model gets no adapter, whatever else target_modules match."""
    asked = adapter.exclude_modules
    beside = [] if adapter.target_towers else beside_language(model)
    all_linear = isinstance(adapter.target_modules, str) and adapter.target_modules.lower() == "all-linear"
    others = [*unfit_linears(model), *_read_by_kernels(model)] if all_linear else []
    patterns = [*(rf"{re.escape(name)}(?:\..*)?" for name in beside), *dict.fromkeys(map(_in_any_block, others))]
    if not patterns:
        return list(asked) if isinstance(asked, tuple) else asked
    return "|".join([*_as_pattern(asked), *patterns])


def unfit_linears(model: PreTrainedModel) -> list[str]:
    """Names of linear layers that give back something else than the product of their input, as routers of experts do,
    or are a part of another, or whose weights other code reads: asked of a model without contents."""
    bypassed = bypassed_linears(model)
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    within = {f"{name}.{inner}" for name, layer in linears for inner, _ in layer.named_modules() if inner}
    return [name for name, layer in linears if name in bypassed or name in within or not _multiplies(layer)]


def lost_problems(adapted: nn.Module) -> Iterator[Problem]:
    """An adapter that peft writes by names under which it would not find its own tensors again."""
    written = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if lost := set_peft_model_state_dict(adapted, dict(written)).unexpected_keys:
        text = f"peft would write {lost[0]}, which it would not load again"
        yield "adapter.target_modules", f"{text}: name such layers in adapter.exclude_modules"


def rank_problems(adapter: AdapterSection, adapted: nn.Module) -> Iterator[Problem]:
    """Initialisations that take the adapter from a decomposition of the weight, which has no more than its rank."""
    if not adapter.init_lora_weights.startswith(DECOMPOSED):
        return
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear):
            most = min(module.in_features, module.out_features)
            if adapter.r > most:
                layer = name.removeprefix("base_model.model.")
                text = f"{adapter.r}, and {layer} has a rank of at most {most}, which init_lora_weights"
                yield "adapter.r", f"{text} {adapter.init_lora_weights} cannot exceed; lower it"
                return


def size_problems(trainable: int, device: Device) -> Iterator[Problem]:
    """Adapters of so many parameters that have no place."""
    needed = 4 * trainable
    if needed > device.total_bytes:
        text = f"the weights of the adapters alone take {needed / 2**30:,.1f} GiB, and {device.name} has"
        yield "adapter.r", f"{text} {device.total_bytes / 2**30:,.1f} GiB; lower it, or name fewer target_modules"


def _read_by_kernels(model: PreTrainedModel) -> list[str]:
    """Layers whose weights a kernel takes without asking the layer, so that peft refuses them."""
    if model.config.model_type not in MAMBA:
        return []
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.endswith(".out_proj")]


def _multiplies(layer: nn.Linear) -> bool:
    if type(layer).forward is nn.Linear.forward:
        return True
    try:
        given = layer(torch.empty(1, 2, layer.in_features, device="meta", dtype=layer.weight.dtype))
    except Exception:  # it wants something else, or other shapes
        return False
    return isinstance(given, torch.Tensor) and given.shape == (1, 2, layer.out_features)


def _in_any_block(name: str) -> str:
    """A pattern of the layers of that name in all blocks."""
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


def _as_pattern(asked: str | Sequence[str] | None) -> list[str]:
    """As peft reads them: a text as it is, the entries of a list as names or ends of names."""
    if not asked:
        return []
    if isinstance(asked, str):
        return [f"(?:{asked})"]
    return [rf"(?:.*\.)?(?:{'|'.join(map(re.escape, asked))})"]
