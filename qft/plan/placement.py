"""On how many GPUs a training runs, and what each of them holds of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from qft.distributed.world import Ranks
from qft.plan.model import refuse
from qft.recipe import LoadedRecipe, Recipe
from qft.recipe.rules import Problem
from qft.recipe.training import AdapterSection

ONE = "distributed.gpus to 1"


@dataclass(frozen=True)
class Placement:
    """Of a training."""

    strategy: Literal["none", "ddp", "fsdp2"] = "none"
    size: int = 1
    """Processes in all, each with a GPU."""
    nodes: int = 1

    @property
    def sharded(self) -> bool:
        return self.strategy == "fsdp2"


ALONE = Placement()


def passes(recipe: Recipe) -> int:
    """Forward passes of an update that GPUs can share: of one row each where the rows of a pass are still open."""
    train, batch = recipe.train, recipe.distributed.global_batch
    if batch is None:
        return train.gradient_accumulation_steps
    return batch if train.per_device_train_batch_size == "auto" else batch // train.micro_batch


def shared(loaded: LoadedRecipe) -> LoadedRecipe:
    """The recipe with what its distributed.global_batch says of an update."""
    if loaded.recipe.distributed.global_batch is None:
        return loaded
    return loaded.having(train={"gradient_accumulation_steps": passes(loaded.recipe)})


def processes(loaded: LoadedRecipe) -> int:
    """How many `qft train` starts on this machine. Raises RecipeError for what so many cannot do."""
    recipe = loaded.recipe
    asked, strategy, cpu = recipe.distributed.gpus, recipe.distributed.strategy, recipe.model.device == "cpu"
    seen = 1 if cpu else max(torch.cuda.device_count(), 1)
    if strategy == "none" or asked == 1:
        return 1
    if recipe.distributed.nodes > 1:
        text = f"{recipe.distributed.nodes}: each node runs the command by torchrun, or by Slurm or Ray (docs/scale.md)"
        refuse(loaded, [("distributed.nodes", text)])
    if asked != "auto":
        if asked > seen and not cpu and torch.cuda.is_available():
            refuse(loaded, [("distributed.gpus", f"{asked}, and this machine has {seen}: set it to auto or less")])
        return asked
    if any(only_alone(loaded)):
        return 1
    return next(count for count in range(seen, 0, -1) if passes(recipe) % count == 0)


def placement_problems(loaded: LoadedRecipe, found: Ranks) -> Iterator[Problem]:
    """What the recipe asks and the processes that were started cannot do."""
    recipe, asked = loaded.recipe, loaded.recipe.distributed
    if asked.gpus not in ("auto", found.local_size):
        text = f"{asked.gpus}, and {found.local_size} started on this machine: start as many by `qft train` or torchrun"
        yield "distributed.gpus", text
    if asked.nodes != found.nodes:
        text = f"{asked.nodes}, and processes were started on {found.nodes}: start them on all (docs/scale.md)"
        yield "distributed.nodes", text
    if found.size == 1:
        return
    if asked.strategy == "none":
        yield "distributed.strategy", f"none is for one GPU, and {found.size} processes were started; set it to auto"
    if (count := passes(recipe)) % found.size:
        what = "distributed.global_batch" if asked.global_batch else "train.gradient_accumulation_steps"
        rows = "rows" if recipe.train.per_device_train_batch_size == "auto" else "forward passes"
        yield (
            what,
            f"an update has {count} {rows}, which {found.size} GPUs cannot share; give a multiple of {found.size}",
        )
    yield from only_alone(loaded)
    yield from _contradicted(recipe)


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


def sharding_problems(loaded: LoadedRecipe) -> Iterator[Problem]:
    """What cannot be where weights are sharded."""
    recipe, ddp = loaded.recipe, "or distributed.strategy to ddp"
    train, quant = recipe.train, recipe.quant
    if quant.mode == "8bit":
        yield "quant.mode", f"8bit weights do not shard under fsdp2: set it to 4bit, {ddp}"
    if quant.mode == "4bit" and quant.quant_storage != compute_dtype(recipe) and loaded.given("quant.quant_storage"):
        text = "fsdp2 shards what is packed in the dtype that is computed in, and leaves the rest whole on each GPU"
        yield "quant.quant_storage", f"{quant.quant_storage}: {text}; remove it, {ddp}"
    if train.optim not in ("auto", "adamw_torch", "adamw_torch_fused"):
        yield "train.optim", f"{train.optim} does not know sharded weights: set it to adamw_torch_fused, {ddp}"
    if train.fp16:
        yield "train.fp16", f"loss scaling is not tried with sharded weights: set train.bf16, {ddp}"
    if train.kernels == "fused":
        yield "train.kernels", f"kernels read whole weights: set it to auto, {ddp}"
    if recipe.eval.metrics:
        yield "eval.metrics", f"answers are generated by whole weights: score the run with `qft eval`, {ddp}"
    yield from _unsharded_adapters(recipe.adapter, ddp)


def _unsharded_adapters(adapter: AdapterSection, ddp: str) -> Iterator[Problem]:
    if adapter.kind == "none":
        yield "adapter.kind", f"fsdp2 is for adapters on a frozen base: set it to lora, {ddp}"
    if adapter.init_lora_weights not in ("default", "gaussian"):
        text = f"{adapter.init_lora_weights} changes or reads whole weights: set it to default, {ddp}"
        yield "adapter.init_lora_weights", text
    for name in ("use_dora", "modules_to_save", "target_experts"):
        if getattr(adapter, name) not in (False, (), "auto"):
            yield f"adapter.{name}", f"is not tried with sharded weights: remove it, {ddp}"
    if adapter.bias != "none":
        yield "adapter.bias", f"biases of the base are trained in another dtype than adapters: set it to none, {ddp}"


def compute_dtype(recipe: Recipe) -> str:
    """In which 4-bit weights are multiplied, where the recipe says; else that of the model."""
    asked = recipe.quant.compute_dtype
    named = recipe.model.dtype if asked == "auto" else asked
    return "bfloat16" if named == "auto" else named


def _contradicted(recipe: Recipe) -> Iterator[Problem]:
    """What variables of accelerate say against the recipe, which alone says how it is trained."""
    for name in ("USE_FSDP", "USE_DEEPSPEED", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_{name}", "false").lower() in ("true", "1"):
            yield "distributed.strategy", f"the variable ACCELERATE_{name} asks for another; unset it"
    others = {"DYNAMO_BACKEND": ("no",), "GRADIENT_ACCUMULATION_STEPS": ("1",), "MIXED_PRECISION": ("no", "bf16")}
    if recipe.train.fp16:
        others["MIXED_PRECISION"] = ("no", "fp16")
    elif recipe.train.bf16 is False:
        others["MIXED_PRECISION"] = ("no",)
    fields = ("train.torch_compile", "train.gradient_accumulation_steps", "train.bf16")
    for field, (name, allowed) in zip(fields, others.items(), strict=True):
        value = os.environ.get(f"ACCELERATE_{name}", allowed[0]).lower()
        if value not in allowed:
            yield field, f"the variable ACCELERATE_{name} says {value}; unset it, and say it in the recipe"
