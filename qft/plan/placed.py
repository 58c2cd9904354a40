"""The plan of a training by several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from qft.distributed.world import Ranks
from qft.errors import RecipeError
from qft.plan.model import refuse
from qft.plan.placement import Placement, compute_dtype, sharding_problems, shared
from qft.recipe import LoadedRecipe
from qft.recipe.section import Problem

if TYPE_CHECKING:
    from qft.data.prepare import Prepared
    from qft.plan.training import Plan


def placed(loaded: LoadedRecipe, found: Ranks, plan: Callable[..., Plan], data: Prepared | None = None) -> Plan:
    """By ddp, if that is left open, where it fits and where weights cannot be sharded; else by fsdp2. `plan` makes the
    plan of a recipe with its rows, if they are encoded, and its placement."""
    loaded = shared(loaded.having(memory={"on_oom": "fail"}))
    strategy, ddp = loaded.recipe.distributed.strategy, Placement("ddp", found.size, found.nodes)
    if strategy == "fsdp2":
        refuse(loaded, sharding_problems(loaded))
    first: Plan | None = None
    if strategy != "fsdp2":
        cannot = strategy == "ddp" or any(sharding_problems(loaded))
        try:
            first = plan(loaded, data=data, placement=ddp)
        except RecipeError:  # an auto of memory may have nothing that fits
            if cannot:
                raise
        if first and (cannot or first.memory.fits is not False or any(_whole_experts(first))):
            return first
    second = plan(_packed(loaded), data=first.data if first else data, placement=replace(ddp, strategy="fsdp2"))
    refuse(second.model.loaded, _whole_experts(second))
    return second


def _whole_experts(plan: Plan) -> Iterator[Problem]:
    """What of a mixture does not shard."""
    ddp, model = "or distributed.strategy to ddp", plan.model
    if model.scheme.holds_experts(model.skeleton):
        yield "quant.mode", f"experts in few bits do not shard under fsdp2: set it to none, {ddp}"
    elif model.experts and model.experts.document.adapted:
        yield "adapter.target_experts", f"is not tried with sharded weights: set it to false, {ddp}"


def _packed(loaded: LoadedRecipe) -> LoadedRecipe:
    """The recipe with 4-bit weights packed in a dtype that shards."""
    four = loaded.recipe.quant.mode == "4bit"
    return loaded.having(quant={"quant_storage": compute_dtype(loaded.recipe)}) if four else loaded
