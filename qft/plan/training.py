"""How a training goes: ModelPlan + data -> Plan, with the arguments of peft and of the Trainer."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import nn

from qft.checkpoint.skeleton import find_blocks
from qft.data.audit import require_sound
from qft.data.prepare import Prepared
from qft.distributed.world import Ranks, world
from qft.documents.plan import AdapterArguments, DataPart, Kept, PlanDocument, PlannedMemory, TrainerArguments
from qft.documents.rows import Finding, RowLengths
from qft.machine.device import Device
from qft.machine.environment import allocator_settings
from qft.memory.fit import Way
from qft.plan.arguments import lora_arguments, mixed_dtype, training_arguments
from qft.plan.experts import balance_problems
from qft.plan.holding import weights_held
from qft.plan.kernels import kernel_problems, planned_kernels
from qft.plan.memory import (
    Forecast,
    checkpoint_problems,
    decided,
    is_open,
    logit_bytes,
    stashes,
    too_large,
    undecidable,
    with_optimizer,
)
from qft.plan.model import ModelPlan, device_problems, partial_problem, plan_model, refuse, require_device
from qft.plan.offload import offload_problems
from qft.plan.packages import missing_packages
from qft.plan.placed import placed
from qft.plan.placement import ALONE, Placement, placement_problems, shared
from qft.plan.rows import encoded_rows, packing_problems, row_findings, row_lengths, weight_problems
from qft.plan.shape import Shape
from qft.plan.stages import Span, joined, most_memory, stage_parts
from qft.plan.template import template_of
from qft.plan.token_rows import occurrences, row_arguments
from qft.recipe import LoadedRecipe, Recipe
from qft.recipe.rules import MOST
from qft.recipe.section import Problem
from qft.recipe.stages import stages_of

PROCESSES = 64
"""That may be started at once on any machine; on one of many cores, four for each."""


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before anything is loaded."""

    model: ModelPlan
    lora: dict[str, Any] | None
    """Arguments of peft.LoraConfig."""
    training: dict[str, Any]
    """Arguments of TrainingArguments, beside the folders."""
    data: Prepared
    ways: tuple[Way, ...] = ()
    """What an `auto` of memory was chosen from, the best first."""
    optimizer: str | None = None
    """What `auto` of train.optim came to, and why; None: the recipe says which."""
    span: Span | None = None
    """None: it is no stage."""
    before: tuple[Plan, ...] = ()
    """The stages that lead to it, which is then the last."""
    placement: Placement = ALONE

    @property
    def stages(self) -> tuple[Plan, ...]:
        """Trainings in their order, each on from what the last came to; itself, if there are no stages."""
        return (*self.before, self)

    @property
    def start(self) -> int:
        """Optimizer steps that the stages before it make."""
        return self.span.start if self.span else 0

    @property
    def leads_on(self) -> bool:
        """Whether another stage follows it."""
        return self.span is not None and self.span.number < self.span.of

    @property
    def kept(self) -> list[Kept]:
        """What each block keeps for the backward pass."""
        layers = self.model.shape.layers
        everywhere: Kept = "inputs" if self.recipe.train.gradient_checkpointing else "all"
        return self.ways[0].kept(layers) if self.ways else [everywhere] * layers

    @property
    def logit_bytes(self) -> int | None:
        """What logits may take at once; None: as much as all do."""
        return logit_bytes(self.model)

    @property
    def checkpoints(self) -> Literal["device", "host"] | None:
        """Where the inputs of blocks wait that keep no more, and those of norms whose outputs are made again; None:
        there are none."""
        if {*self.kept} == {"all"}:
            return None
        return "host" if stashes(self.model) else "device"

    @cached_property
    def kernels(self) -> dict[str, str | None]:
        """Of each kind of part, why the model's own code computes it; None: kernels do, where they agree with that."""
        return planned_kernels(self.model, mixed=self.mixed is not None, sharded=self.placement.sharded)

    @property
    def fewer_passes(self) -> bool:
        """Whether a CPU computes adapters with their layers, and writes out attention of short rows."""
        whole = not self.placement.sharded
        return whole and self.model.device.kind == "cpu" and self.recipe.train.kernels != "plain"

    @property
    def mixed(self) -> torch.dtype | None:
        """Of autocast; None: there is none."""
        return mixed_dtype(self.model.recipe, self.model.device)

    @cached_property
    def memory(self) -> PlannedMemory:
        """Predicted, of this stage alone."""
        return _forecast(self.model, self.lora, self.data, self.placement).document(list(self.ways), self.optimizer)

    @property
    def recipe(self) -> Recipe:
        return self.model.recipe

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training rows."""
        train = self.recipe.train
        if self.data.stream is not None:
            return train.max_steps
        micro_batches = math.ceil(len(self.data.batched) / train.micro_batch)
        return max(math.ceil(micro_batches / train.gradient_accumulation_steps), 1)

    @cached_property
    def steps(self) -> int:
        """Optimizer steps in all, those of the stages before it among them."""
        train = self.recipe.train
        own = train.max_steps if train.max_steps > 0 else math.ceil(train.num_train_epochs * self.steps_per_epoch)
        return self.start + own

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the checkpoints kept, one that a signal asks for among them, and the result: float32 weights and two
        moments each."""
        train, weights = self.recipe.train, self.model.shape.trainable_parameters * 4
        between = {"epoch": self.steps_per_epoch, "steps": train.save_steps}.get(train.save_strategy)
        written = (math.ceil(self.steps / between) if between else 0) + train.save_on_signal + len(self.before)
        # A new one is written before the oldest is removed, and the best is kept beside them.
        kept = (train.save_total_limit or written) + 1 + train.load_best_model_at_end
        return weights * (3 * min(written, kept) + 1)

    @cached_property
    def lengths(self) -> RowLengths:
        """Of the training rows in their batches."""
        return row_lengths(self.recipe, self.data)

    @cached_property
    def findings(self) -> list[Finding]:
        """What of the rows is worth a look."""
        return row_findings(self.recipe, self.data)

    def document(self) -> PlanDocument:
        """For `qft check --json` and the run folder."""
        rows = self.data
        return PlanDocument(
            device=self.model.device_part,
            model=self.model.model_part,
            quantization=self.model.quantization_part,
            skip_modules=self.recipe.quant.skip_modules,
            matched=self.model.matched,
            adapter=AdapterArguments(**self.lora) if self.lora else None,
            experts=self.model.experts.document if self.model.experts else None,
            offload=self.recipe.memory.offload,
            checkpoints=self.checkpoints,
            kernels=self.kernels,
            training=TrainerArguments(**self.training),
            data=DataPart(
                train_rows=len(rows.train),
                packed_rows=len(rows.batched) if self.recipe.data.packing else None,
                streamed_lines=rows.stream.lines if rows.stream is not None else None,
                eval_rows=len(rows.eval) if rows.eval else 0,
                chat_template=template_of(self.model.tokenizer, self.recipe.data),
                max_length=self.model.longest_row(self.recipe.data),
                lengths=self.lengths,
                findings=self.findings,
                added_tokens=occurrences(self.model.checkpoint.added, rows.train),
                sources=list(rows.sources),
            ),
            steps=self.steps,
            stages=stage_parts(self),
            memory=most_memory(self),
            gpu_allocator=allocator_settings() if self.model.device.kind == "cuda" else None,
        )


def make_plan(loaded: LoadedRecipe, device: Device | None = None, found: Ranks | None = None) -> Plan:
    """Decide everything, for the device and the processes that there are, or for those given. Raises RecipeError for
    what model, data or device cannot do; MissingError, DataError, ModelError as the layers below."""
    recipe, found = loaded.recipe, found or world().ranks
    if not recipe.data.train:
        refuse(loaded, [("data.train", "holds no rows to train on; calibrate.data is for `qft calibrate` alone")])
    device = device or require_device(loaded)
    refuse(loaded, placement_problems(loaded, found))
    if found.size > 1:
        return placed(loaded, found, partial(plan_one, device=device))
    plans: list[Plan] = []
    for stage in stages_of(shared(loaded)):
        plans.append(plan_one(stage, device, plans[0].data if plans else None))
    return joined(plans) if recipe.train.stages else plans[0]


def plan_one(loaded: LoadedRecipe, device: Device, data: Prepared | None, placement: Placement = ALONE) -> Plan:
    """Of one stage, or of a training without any; `data` are its rows, if another stage has encoded them."""
    recipe = loaded.recipe
    refuse(loaded, [*device_problems(recipe, device), *_training_problems(recipe, device)])
    model, lora = plan_adapter(loaded, device)
    problems = [*model.scheme.problems(recipe), *_share_problems(model), *_length_problems(recipe, model.shape)]
    problems += [*balance_problems(recipe, model.skeleton), *packing_problems(recipe, model.skeleton)]
    refuse(loaded, [*problems, *offload_problems(model), *checkpoint_problems(model)])
    data = data or encoded_rows(model)
    loaded, optimizer = with_optimizer(_forecast(model, lora, data, placement))
    model, ways = _fitted(dataclasses.replace(model, loaded=loaded), lora, data, placement)
    training = training_arguments(model.recipe, device, placement)
    plan = Plan(model, lora, training, data, ways, optimizer, placement=placement)
    problems = [*weight_problems(recipe, data, model.skeleton), *kernel_problems(plan.recipe, plan.kernels)]
    refuse(loaded, [*_step_problems(plan), *problems])
    require_sound(plan.findings)
    return plan


def plan_adapter(loaded: LoadedRecipe, device: Device | None = None) -> tuple[ModelPlan, dict[str, Any] | None]:
    """The model of a training, and the arguments of its adapter, None without one: all that it plans without looking at
    data. Raises as `plan_model`."""
    lora = lora_arguments(loaded.recipe) if loaded.recipe.adapter.kind == "lora" else None
    model = plan_model(loaded, lora, device=device)
    rows = row_arguments(loaded.recipe.adapter, model.checkpoint.added, model.skeleton)
    lora = lora and lora | {"exclude_modules": model.unadapted} | rows
    return model, model.experts.arguments(lora) if lora and model.experts else lora


def _fitted(
    model: ModelPlan, lora: dict[str, Any] | None, data: Prepared, placement: Placement
) -> tuple[ModelPlan, tuple[Way, ...]]:
    """The model's plan with every `auto` of memory decided, and what it was chosen from. Raises RecipeError if nothing
    fits."""
    if not is_open(model.recipe):
        return model, ()
    forecast = _forecast(model, lora, data, placement)
    refuse(model.loaded, undecidable(forecast))
    found = forecast.ways()
    refuse(model.loaded, too_large(found, forecast))
    return dataclasses.replace(model, loaded=decided(model.loaded, found[0], placement.size)), tuple(found)


def _forecast(model: ModelPlan, lora: dict[str, Any] | None, data: Prepared, placement: Placement) -> Forecast:
    mixed = mixed_dtype(model.recipe, model.device)
    planned = planned_kernels(model, mixed=mixed is not None, sharded=placement.sharded)
    kernels = tuple(kind for kind, reason in planned.items() if reason is None)
    return Forecast(model, lora, data, mixed, kernels, placement)


def with_skip_modules(plan: Plan, names: Sequence[str]) -> Plan:
    """The plan once quant.skip_modules auto has become `names`."""
    model = plan.model
    chosen = {"skip_modules": names, "skip_budget_bits": None, "skip_budget_bytes": None}
    loaded, scheme = model.loaded.having(quant=chosen), model.scheme.leaving(names)
    held = weights_held(scheme, loaded.recipe, model.skeleton)
    changed = dataclasses.replace(model, loaded=loaded, scheme=scheme, held=held)
    return dataclasses.replace(plan, model=changed)


def _share_problems(model: ModelPlan) -> Iterator[Problem]:
    """A base that is called quantized and is not, for the most part."""
    recipe = model.recipe
    if model.scheme.name == "none":
        if recipe.quant.allow_partial:
            yield "quant.allow_partial", "nothing is quantized with quant.mode none; remove it"
    elif recipe.quant.skip_modules == "auto" and not _has_linears(model):
        yield "quant.skip_modules", "auto measures layers of torch.nn.Linear, and the blocks hold none: name the layers"
    elif not recipe.quant.allow_partial:
        field = "model.path" if model.checkpoint.quantization else "quant.mode"
        yield from partial_problem(model.held, field, "quant.allow_partial")


def _has_linears(model: ModelPlan) -> bool:
    blocks = find_blocks(model.skeleton, model.shape.layers)[1]
    return any(isinstance(module, nn.Linear) for module in blocks.modules())


def _step_problems(plan: Plan) -> Iterator[Problem]:
    epochs, late = plan.recipe.train.num_train_epochs, plan.recipe.quant.fake_quant_after_steps
    if late and late >= plan.steps:
        text = f"{late}, and the training has {plan.steps} steps: nothing would be rounded; lower it"
        yield "quant.fake_quant_after_steps", text
    if plan.recipe.train.max_steps < 0 and epochs * plan.steps_per_epoch > MOST:
        yield "train.num_train_epochs", f"{epochs:g} epochs are more than {MOST} steps; lower it"


def _length_problems(recipe: Recipe, shape: Shape) -> Iterator[Problem]:
    asked, longest = recipe.data.max_length, shape.max_positions
    if longest and asked != "auto" and asked > longest:
        yield "data.max_length", f"{asked}, and the model was built for {longest} tokens"


def _training_problems(recipe: Recipe, device: Device) -> Iterator[Problem]:
    """What the train and eval sections ask and this machine cannot do."""
    train = recipe.train
    if train.bf16 is True and not device.bf16:
        yield "train.bf16", f"{device.name} has no bfloat16; set it to false, and train.fp16 to true"
    if train.tf32 is True and not device.tf32:
        yield "train.tf32", f"{device.name} has no TensorFloat-32; set it to auto or false"
    if device.kind == "cpu":
        if train.fp16:
            yield "train.fp16", "float16 with loss scaling needs a GPU; set it to false, and train.bf16 to true"
        if train.bf16 is True and recipe.model.dtype == "float16":
            yield "train.bf16", "a CPU multiplies no float16 with bfloat16; set it to auto, or model.dtype to bfloat16"
        if train.dataloader_pin_memory is True:
            yield "train.dataloader_pin_memory", "is for copies to a GPU; set it to auto or false"
        if train.optim.startswith("paged"):
            yield "train.optim", f"{train.optim} pages between GPU and host; on a CPU use adamw_8bit or adamw_torch"
    yield from _process_problems(recipe)
    for name in train.report_to:
        if importlib.util.find_spec(name) is None:
            yield "train.report_to", f"{name} is not installed; pip install {name}, or change the field"
    yield from missing_packages(recipe.eval.metrics)


def _process_problems(recipe: Recipe) -> Iterator[Problem]:
    most = max(PROCESSES, 4 * (os.cpu_count() or 1))
    for field, asked in (
        ("data.num_proc", 1 if recipe.data.num_proc == "auto" else recipe.data.num_proc),
        ("train.dataloader_num_workers", recipe.train.dataloader_num_workers),
    ):
        if asked > most:
            yield field, f"{asked} processes at once are more than this machine is for; give {most} or fewer"
