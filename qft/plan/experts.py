"""What a mixture of experts is made of, and whether its experts get adapters: adapter.target_experts decided."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qft.documents.plan import PlannedExperts
from qft.plan.modules import BLOCK, ends_with, is_all_linear
from qft.quant.experts import expert_parameters, owner, routers
from qft.quant.share import count_weights
from qft.recipe import Recipe
from qft.recipe.section import Problem
from qft.recipe.training import AdapterSection

LEAST, MOST = 0.5, 0.1
"""Of the model's weights that experts must be for `auto` to adapt them, and of theirs that their adapters may be."""
FIELD = "adapter.target_experts"


@dataclass(frozen=True)
class Experts:
    """The mixture's part in a training of adapters."""

    document: PlannedExperts
    modules: tuple[str, ...] | None
    """What all-linear stands for; None: target_modules stay as they are."""
    parameters: tuple[str, ...]
    """For peft's target_parameters."""

    def arguments(self, lora: dict[str, Any]) -> dict[str, Any]:
        """Arguments of peft.LoraConfig with experts adapted as decided, and with nothing that peft itself would add."""
        own = {} if self.modules is None else {"target_modules": list(self.modules)}
        return lora | own | ({"target_parameters": list(self.parameters)} if self.parameters else {})


def plan_experts(recipe: Recipe, model: PreTrainedModel) -> Experts | None:
    """None: the skeleton `model` has no experts, or is trained whole."""
    stacks, adapter = expert_parameters(model), recipe.adapter
    if not stacks or adapter.kind == "none":
        return None
    taken = _taken(adapter, list(stacks))
    weights, whole = sum(p.numel() for p in stacks.values()), sum(count_weights(model).values())
    named = _named(adapter, model)
    cost = _trainable(stacks, dict.fromkeys(taken, adapter.r) | named)
    why = _decided(recipe, weights / whole, cost / weights, named)
    adapts, unadapted = why.startswith("true"), list[str]()
    taken = taken if adapts and not (named and adapter.target_experts == "auto") else []
    modules = None
    if is_all_linear(adapter.target_modules):
        names = _linears(model)
        modules = tuple(dict.fromkeys(_entry(name, names, model) for name in names))
        modules, lost = _known_to_peft(modules, model)
        unadapted = [name for name in names if any(ends_with(name, entry) for entry in lost)]
    document = PlannedExperts(
        experts=max(p.shape[0] for p in stacks.values()),
        weights=weights,
        share=weights / whole,
        adapted=len({*taken, *named}),
        trainable_parameters=_trainable(stacks, dict.fromkeys(taken, adapter.r) | named),
        decided=why,
        router=_router(adapter, model),
        unadapted=unadapted,
    )
    return Experts(document, modules, tuple(taken))


def expert_problems(recipe: Recipe, model: PreTrainedModel) -> Iterator[Problem]:
    """What keeps experts from being adapted that are asked to be."""
    adapter = recipe.adapter
    if adapter.target_experts is False and (named := _named(adapter, model)):
        yield FIELD, f"false, and peft takes names in target_modules for {min(named)} and its like; remove those"
    if adapter.target_experts is not True:
        return
    stacks = expert_parameters(model)
    if not stacks:
        yield FIELD, "the model has no experts that are held as parameters of three dimensions; remove it"
    elif not _taken(adapter, list(stacks)):
        yield FIELD, "exclude_modules and layers_to_transform leave no experts"
    elif reason := _obstacle(recipe):
        yield FIELD, f"{reason}; change that, or set it to false"


def _named(adapter: AdapterSection, model: PreTrainedModel) -> dict[str, int]:
    """Experts' parameters that peft takes names in target_modules for, and the rank that it gives them."""
    targets = adapter.target_modules
    if is_all_linear(targets):
        return {}
    config = LoraConfig(r=adapter.r, target_modules=targets if isinstance(targets, str) else list(targets))
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # one of several that are fused: told as it is attached
        return {}
    ends, ranks = config.target_parameters or (), config.rank_pattern
    found = [name for name in expert_parameters(model) if any(ends_with(name, end) for end in ends)]
    return {name: int(ranks.get(get_pattern_key(list(ranks), name), adapter.r)) for name in found}


def _trainable(stacks: Mapping[str, nn.Parameter], ranks: Mapping[str, int]) -> int:
    """Parameters of adapters of these ranks."""
    return sum(rank * stacks[name].shape[0] * sum(stacks[name].shape[1:]) for name, rank in ranks.items())


def set_balance(recipe: Recipe, model: Any) -> None:
    """Have a model compute its balance loss as train.router_aux_loss_coef says."""
    asked = recipe.train.router_aux_loss_coef
    if asked is None:
        return
    model.config.output_router_logits, model.config.router_aux_loss_coef = asked > 0, asked
    model.router_aux_loss_coef = asked


def balance_problems(recipe: Recipe, model: Any) -> Iterator[Problem]:
    """A balance loss that is asked of a model whose code has none."""
    if recipe.train.router_aux_loss_coef is not None and getattr(model, "router_aux_loss_coef", None) is None:
        yield "train.router_aux_loss_coef", f"{type(model).__name__} computes no loss of that kind; remove it"


def _decided(recipe: Recipe, share: float, cost: float, named: Collection[str]) -> str:
    """true or false, and why."""
    adapter = recipe.adapter
    if adapter.target_experts != "auto":
        return f"{str(adapter.target_experts).lower()}, as the recipe says"
    if named:
        return "true: target_modules names them"
    if not is_all_linear(adapter.target_modules):
        return "false: target_modules names what is adapted"
    if reason := _obstacle(recipe):
        return f"false: {reason}"
    if share < LEAST:
        return f"false: experts are {share:.0%} of the weights"
    told = f"experts are {share:.0%} of the weights, and their adapters would be {cost:.1%} of theirs"
    return f"false: {told}, more than {MOST:.0%}" if cost > MOST else f"true: {told}"


def _obstacle(recipe: Recipe) -> str | None:
    """What cannot be done on parameters."""
    adapter = recipe.adapter
    if recipe.train.torch_compile:
        return "train.torch_compile compiles no adapters on experts' parameters"
    if adapter.lora_dropout:
        return "peft has no lora_dropout on experts' parameters"
    if adapter.use_dora:
        return "peft has no use_dora on experts' parameters"
    if adapter.init_lora_weights.startswith(("pissa", "olora")):
        return f"init_lora_weights {adapter.init_lora_weights} decomposes layers, and experts are parameters"
    return None


def _taken(adapter: AdapterSection, names: list[str]) -> list[str]:
    """Full names of experts' parameters that exclude_modules and layers_to_transform leave."""
    excluded, blocks = adapter.exclude_modules or (), adapter.layers_to_transform

    def is_out(name: str) -> bool:
        if isinstance(excluded, str):
            return re.fullmatch(excluded, owner(name)) is not None
        return any(ends_with(owner(name), entry) for entry in excluded)

    kept = [name for name in names if not is_out(name)]
    return [n for n in kept if blocks is None or ((found := BLOCK.match(n)) and int(found[1]) in blocks)]


def _linears(model: PreTrainedModel) -> list[str]:
    """What all-linear adapts: linear layers but the head, and not the routers, which pick experts."""
    left = {model.get_output_embeddings(), *(model.get_submodule(name) for name in routers(model))}
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m not in left]


def _entry(name: str, names: list[str], model: PreTrainedModel) -> str:
    """What a layer is called in target_modules: the last part of its name, where that means no other module."""
    last = name.rpartition(".")[2]
    others = any(ends_with(other, last) and other not in names for other, _ in model.named_modules())
    return name if last.isdigit() or others else last


def _known_to_peft(entries: tuple[str, ...], model: PreTrainedModel) -> tuple[tuple[str, ...], list[str]]:
    """Entries of target_modules, and those that peft takes for names of experts, which it would then adapt its way."""
    lost = []
    for entry in entries:
        config = LoraConfig(target_modules=[entry])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # one of several that are fused
            lost.append(entry)
        else:
            lost += [] if set(config.target_modules or ()) == {entry} else [entry]
    return tuple(entry for entry in entries if entry not in lost), lost


def _router(adapter: AdapterSection, model: PreTrainedModel) -> str:
    """What becomes of what picks the experts."""
    names = routers(model)
    if any(name.endswith(entry) for name in names for entry in adapter.modules_to_save):
        return "trained in full (modules_to_save)"
    targets = adapter.target_modules
    if is_all_linear(targets):
        return "frozen"
    entries = (targets,) if isinstance(targets, str) else targets
    hit = any(re.fullmatch(e, n) if isinstance(targets, str) else ends_with(n, e) for n in names for e in entries)
    return "adapted (target_modules)" if hit else "frozen"
