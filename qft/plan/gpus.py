"""What each of several GPUs, here or elsewhere, would take of a training: by ddp and by fsdp2."""

from __future__ import annotations

import psutil

from qft.data.prepare import Prepared
from qft.distributed.world import Ranks
from qft.documents.placement import PlannedGpus, PlannedPlacement
from qft.errors import QftError, RecipeError
from qft.machine.device import Device
from qft.memory.predict import CONTEXT
from qft.plan.placed import placed
from qft.plan.placement import placement_problems
from qft.plan.sharding import Held, loads_by_block
from qft.plan.training import Plan, make_plan, plan_one
from qft.recipe import LoadedRecipe

STRATEGIES = ("ddp", "fsdp2")


def plan_gpus(loaded: LoadedRecipe, device: Device, gpus: int, nodes: int) -> tuple[Plan, PlannedGpus]:
    """The plan of what would be done, and both ways beside each other. Raises RecipeError where neither can be."""
    found = Ranks(0, gpus * nodes, 0, gpus)
    asked = loaded.recipe.distributed.strategy
    here = loaded.having(distributed={"gpus": "auto", "nodes": nodes})
    if found.size == 1 or asked == "none":
        plan = make_plan(here.having(distributed={"strategy": "none", "nodes": 1}), device, Ranks())
        return plan, _told(plan, device, gpus, nodes, [_placement(plan, gpus)], "none")
    plans: dict[str, Plan] = {}
    told: dict[str, PlannedPlacement] = {}
    data: Prepared | None = None
    for strategy in STRATEGIES:
        try:
            plans[strategy] = _planned(here.having(distributed={"strategy": strategy}), device, found, data)
            data = plans[strategy].data
            told[strategy] = _placement(plans[strategy], gpus)
        except RecipeError as error:
            told[strategy] = PlannedPlacement(strategy=strategy, cannot="; ".join(error.problems))
            failed: QftError = error
    if not plans:
        raise failed
    fitting = [name for name in plans if told[name].fits is not False]
    chosen = asked if asked in plans else next(iter(fitting), [*plans][-1])
    if asked != "auto" and asked not in plans:
        raise failed
    return plans[chosen], _told(plans[chosen], device, gpus, nodes, [*told.values()], chosen)


def _planned(loaded: LoadedRecipe, device: Device, found: Ranks, data: Prepared | None) -> Plan:
    if problems := [loaded.problem(*each) for each in placement_problems(loaded, found)]:
        raise RecipeError(problems)
    return placed(loaded, found, lambda each, data, placement: plan_one(each, device, data, placement), data)


def _told(
    plan: Plan, device: Device, gpus: int, nodes: int, placements: list[PlannedPlacement], chosen: str
) -> PlannedGpus:
    return PlannedGpus(
        gpus=gpus,
        nodes=nodes,
        device_bytes=device.total_bytes,
        budget_bytes=plan.memory.budget_bytes,
        chosen=chosen,
        placements=placements,
    )


def _placement(plan: Plan, gpus: int) -> PlannedPlacement:
    model, placement, memory = plan.model, plan.placement, plan.memory
    held, trained, size = Held.of(model), 4 * model.shape.trainable_parameters, placement.size
    received = held.blocks + trained if placement.sharded else 0
    load = held.at_load(model, placement) + trained + CONTEXT
    peak = memory.predicted_peak_bytes and memory.predicted_peak_bytes + CONTEXT
    files = sum(path.stat().st_size for path in model.checkpoint.weight_files()) if model.checkpoint.has_weights else 0
    host = memory.predicted_host_bytes
    parts = held.blocks // placement.nodes if placement.sharded and loads_by_block(model) else 0
    return PlannedPlacement(
        strategy=placement.strategy,
        load_bytes=load,
        peak_bytes=peak,
        fits=None if peak is None else max(load, peak) <= memory.budget_bytes,
        host_bytes=host and gpus * max(host - files, psutil.Process().memory_info().rss) + files + parts,
        gathered_bytes=(2 * received + held.around) * (size - 1) // size if placement.sharded else 0,
        reduced_bytes=trained * (size - 1) // size * (1 if placement.sharded else 2),
        rows=plan.recipe.train.micro_batch,
        accumulated=plan.training["gradient_accumulation_steps"],
        steps=plan.steps,
    )
