"""The plans of a training's stages as one."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from qft.documents.plan import PlannedMemory, PlannedStage, TrainerArguments
from qft.plan.model import refuse
from qft.recipe.stages import staged

if TYPE_CHECKING:
    from qft.plan.training import Plan


@dataclass(frozen=True)
class Span:
    """Where a stage lies in its run."""

    number: int
    """From 1."""
    of: int
    """Stages in all."""
    start: int
    """Optimizer steps before it."""
    schedule_steps: int
    """Over which the learning rate's schedule goes, of which it has a part."""
    reset_optimizer: bool
    reset_lr_scheduler: bool


def joined(plans: Sequence[Plan]) -> Plan:
    """The last one's plan, which has the others before it; each was made as if it were alone. Raises RecipeError where
    that makes them differ in what they share."""
    starts = list(accumulate((plan.steps for plan in plans), initial=0))
    made = [dataclasses.replace(plan, span=_span(plans, index, starts)) for index, plan in enumerate(plans)]
    made = [dataclasses.replace(plan, training=plan.training | {"max_steps": plan.steps}) for plan in made]
    for one, other in pairwise(made):
        was, now = one.recipe.train.optim, other.recipe.train.optim
        if was != now and other.span and not other.span.reset_optimizer:
            text = f"auto comes to {now}, and to {was} in the stage before, with whose state it cannot go on"
            refuse(other.model.loaded, [("train.optim", f"{text}: name one, or set reset_optimizer to true")])
    loaded = staged([plan.model.loaded for plan in plans])
    model = dataclasses.replace(made[-1].model, loaded=loaded)
    return dataclasses.replace(made[-1], model=model, before=tuple(made[:-1]))


def _span(plans: Sequence[Plan], index: int, starts: Sequence[int]) -> Span:
    stages = [plan.model.loaded.stage for plan in plans]
    begun = [0, *(i for i, stage in enumerate(stages) if i and stage and stage.resets("lr_scheduler")), len(plans)]
    first = max(i for i in begun if i <= index)
    end = min(i for i in begun if i > index)
    stage = stages[index]
    assert stage
    return Span(
        number=index + 1,
        of=len(plans),
        start=starts[index],
        schedule_steps=starts[end] - starts[first],
        reset_optimizer=stage.resets("optimizer"),
        reset_lr_scheduler=stage.resets("lr_scheduler"),
    )


def stage_parts(plan: Plan) -> list[PlannedStage]:
    """Of each stage; none, if there are no stages."""
    return [
        PlannedStage(
            first_step=each.start + 1,
            last_step=each.steps,
            quantization=each.model.quantization_part,
            training=TrainerArguments(**each.training),
            reset_optimizer=each.span.reset_optimizer,
            reset_lr_scheduler=each.span.reset_lr_scheduler,
            memory=each.memory,
        )
        for each in plan.stages
        if each.span
    ]


def most_memory(plan: Plan) -> PlannedMemory:
    """Of its stages: of one of which nothing can be predicted, or else of the largest."""
    unknown = sys.maxsize
    return max((each.memory for each in plan.stages), key=lambda memory: memory.predicted_peak_bytes or unknown)
