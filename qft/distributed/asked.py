"""How many processes a recipe comes to on this machine, asked before anything slow is imported."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qft.errors import RecipeError
from qft.recipe import LoadedRecipe, Recipe
from qft.recipe.section import Problem

ONE = "distributed.gpus to 1"


def passes(recipe: Recipe) -> int:
    """Forward passes of an update that GPUs can share: of one row each where the rows of a pass are still open."""
    train, batch = recipe.train, recipe.distributed.global_batch
    if batch is None:
        return train.gradient_accumulation_steps
    return batch if train.per_device_train_batch_size == "auto" else batch // train.micro_batch


def processes(loaded: LoadedRecipe) -> int:
    """How many `qft train` starts on this machine. Raises RecipeError for what so many cannot do."""
    recipe = loaded.recipe
    asked, strategy, cpu = recipe.distributed.gpus, recipe.distributed.strategy, recipe.model.device == "cpu"
    seen = 1 if cpu else max(torch.cuda.device_count(), 1)
    if strategy == "none" or asked == 1:
        return 1
    if recipe.distributed.nodes > 1:
        text = f"{recipe.distributed.nodes}: each node runs the command by torchrun, or by Slurm or Ray (docs/scale.md)"
        raise RecipeError(loaded.problem("distributed.nodes", text))
    if asked != "auto":
        if asked > seen and not cpu and torch.cuda.is_available():
            text = f"{asked}, and this machine has {seen}: set it to auto or less"
            raise RecipeError(loaded.problem("distributed.gpus", text))
        return asked
    if any(only_alone(loaded)):
        return 1
    return next(count for count in range(seen, 0, -1) if passes(recipe) % count == 0)


def only_alone(loaded: LoadedRecipe) -> Iterator[Problem]:
    """What the recipe asks that only one GPU does."""
    recipe = loaded.recipe
    train, quant = recipe.train, recipe.quant
    if recipe.memory.offload != "none":
        yield "memory.offload", f"blocks come and go on one GPU alone: use distributed.strategy fsdp2, or set {ONE}"
    if recipe.memory.on_oom == "fit" and loaded.given("memory.on_oom"):
        yield "memory.on_oom", f"a step that others share cannot be made again: set it to fail, or {ONE}"
    if train.stages:
        yield "train.stages", f"stages follow each other on one GPU: set {ONE}"
    if train.label_smoothing_factor:
        yield "train.label_smoothing_factor", f"is averaged by micro-batch, which GPUs share: set it to 0, or {ONE}"
    if train.torch_compile:
        yield "train.torch_compile", f"is not tried with several GPUs: set it to false, or {ONE}"
    if quant.mode in ("qat", "custom"):
        yield "quant.mode", f"{quant.mode} is for one GPU: set {ONE}"
