"""A training of several stages: which are left, and what is done where one ends and the next begins.

A stage goes on from the last one's checkpoint as a resumed run does, with another base. So it makes no difference
whether the process that begins it is the one that ended the one before."""

import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qft.documents.state import TrainingState
from qft.plan import Plan
from qft.run.checkpoint import step_of


class Border(TrainerCallback):
    """Evaluates, and writes a checkpoint, behind the last step of a stage that another one follows."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < self.plan.steps:
            return
        # With `epoch` the library does it behind this, as if an epoch had ended.
        control.should_save |= args.save_strategy != "epoch"
        control.should_evaluate |= self.plan.data.eval is not None and args.eval_strategy != "epoch"


def stages_left(stages: Sequence[Plan], checkpoint: Path | None, state: TrainingState) -> list[Plan]:
    """Those in which something is left to do behind the checkpoint, the last one in any case."""
    done = step_of(checkpoint)
    return [
        plan
        for plan in stages
        if plan.steps > done or not plan.leads_on or (plan.steps == done and state.evaluation_due)
    ]


def told_of(plan: Plan) -> str:
    """Which stage it is, to follow what is said; nothing, if there are none."""
    if not plan.span:
        return ""
    held = plan.model.scheme.words()
    return f" for stage {plan.span.number} of {plan.span.of}: {held}; steps {plan.start + 1} to {plan.steps}"


def free() -> None:
    """Give back what a stage has held, once nothing refers to it."""
    if library := sys.modules.get("bitsandbytes"):
        # For 8-bit optimizers the Trainer tells it of each embedding, which it would keep for ever.
        library.optim.GlobalOptimManager.get_instance().module_weight_config_triple.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
