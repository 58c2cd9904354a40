"""The kernels of a plan, put into the loaded model."""

from typing import Any

from transformers import TrainerCallback

from qft.checkpoint.skeleton import find_blocks
from qft.documents.training import Kernels
from qft.errors import ModelError
from qft.kernels import FLOAT8, Dither, apply
from qft.training.recorder import Recorder


def fuse(model: Any, recorder: Recorder) -> None:
    """Have the parts that the plan names computed by kernels, where they agree with the model's own code, and tell the
    recorder. Raises ModelError where train.kernels demands it and a part does not agree, or train.matmul float8 and no
    product is in it."""
    plan = recorder.plan
    kinds = [kind for kind, reason in plan.kernels.items() if reason is None]
    if not kinds:
        return
    blocks = find_blocks(model.get_base_model() if plan.lora else model, plan.model.shape.layers)[1]
    applied = apply(model, blocks, kinds, plan.mixed)
    recorder.keeps, recorder.dither = applied.keeps, applied.dither
    recorder.kernels = Kernels(fused=dict(applied.fused), plain=dict(applied.plain))
    told = "; ".join(f"{count} modules: {reason}" for reason, count in applied.plain.items())
    if FLOAT8 in kinds and FLOAT8 not in applied.fused:
        raise ModelError(f"{plan.model.checkpoint.path}: no {FLOAT8}: {told}. Set train.matmul to 16bit")
    if applied.plain and plan.recipe.train.kernels == "fused":
        raise ModelError(f"{plan.model.checkpoint.path}: not all of it can be fused: {told}. Set train.kernels to auto")


class RoundedAnew(TrainerCallback):
    """Has what is in float8 be rounded otherwise in each step."""

    def __init__(self, dither: Dither) -> None:
        self.dither = dither

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.dither.step = state.global_step
