"""The work of a training run: load, evaluate, train, save, evaluate."""

from pathlib import Path
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from qft.checkpoint.skeleton import find_blocks
from qft.data.batch import Collator, pad_token_id
from qft.distributed.gate import BitGate
from qft.distributed.sharded import gathered, plugin_arguments, trained
from qft.distributed.world import world
from qft.errors import Interrupted, ModelError
from qft.kernels.buffers import SCRATCH
from qft.machine.environment import own_determinism
from qft.machine.signals import Signals
from qft.memory.chunked_loss import LOGITS, chunk_loss, rows_at_once
from qft.memory.fused_loss import fuse_loss
from qft.memory.guard import memory_guard
from qft.memory.offload import Offload
from qft.memory.packed import packs_as_alone
from qft.memory.unmasked import needs_no_mask
from qft.model.adapter import CHANGES_BASE, attach_adapter, save_adapter, save_full
from qft.model.balance import BalanceWatch
from qft.model.load import load_base
from qft.model.offload import load_offloaded, look_up_on_host, offloading
from qft.model.on_cpu import join_adapters
from qft.model.sharded import load_for_sharding
from qft.plan import Plan
from qft.plan.rows import UNWEIGHTED
from qft.quant.rounding_state import state_of
from qft.quant.share import measured_share
from qft.run.checkpoint import is_over, step_of
from qft.run.folder import Run, record_base
from qft.run.lock import require_ours
from qft.training.evaluation import HeldOut
from qft.training.events import Events
from qft.training.fusing import RoundedAnew, fuse
from qft.training.modules import AskedLess
from qft.training.qat import RoundingSchedule, require_observed
from qft.training.recorder import Recorder
from qft.training.sharding import shard
from qft.training.stages import Border, free, stages_left, told_of
from qft.training.surviving import SurvivingTrainer
from qft.training.workers import workers_heard


def train_model(run: Run, recorder: Recorder, signals: Signals) -> Path:
    """Train as the recorder's plan says, from the run's checkpoint if it is resumed; returns where the result lies.

    Raises Interrupted when a signal has come, behind its step."""
    if run.checkpoint:
        recorder.recall(run.checkpoint)
    with recorder.meter, own_determinism():
        for plan in stages_left(recorder.stages, run.checkpoint, recorder.earlier):
            recorder.take_up(plan)
            with SCRATCH.apart(), offloading(plan.model, run.folder) as offload:
                result = _train_stage(run, recorder, signals, offload)
            if plan.leads_on:
                run.checkpoint = result
                free()
    return result


def _train_stage(run: Run, recorder: Recorder, signals: Signals, offload: Offload | None) -> Path:
    """One stage, or all that there is: its checkpoint, or where the result lies. Nothing that it loads outlives it."""
    plan, checkpoint = recorder.plan, run.checkpoint
    set_seed(plan.recipe.seed)
    recorder.view.note(f"Loading {plan.model.checkpoint.path}{told_of(plan)}")
    recorder.reach("before_load", "load")
    model = _load(recorder, run, offload)
    trainer = _trainer(model, run, recorder, signals)
    if recorder.gate:
        recorder.meter.enter("shard")
        shard(trainer)
        recorder.gate.arm()
        _try_rows(model, recorder)
    recorder.loaded(model)
    # Under autocast a LoRA layer need not cast its input to float32 first, which would be kept for backward.
    mixed = plan.training["bf16"] or plan.training["fp16"]
    guard = memory_guard("training", trainer.still_to_do())
    with guard, workers_heard(), disable_input_dtype_casting(model, active=mixed):
        held_out = HeldOut(trainer, run)
        if checkpoint:
            held_out.recall("before")
        if step_of(checkpoint) <= plan.start:
            if checkpoint:
                trainer.take_up(checkpoint)
            held_out.evaluate("before")
        recorder.begin(step_of(checkpoint))
        try:
            _take_steps(trainer, checkpoint)
            recorder.end()
            if plan.leads_on:
                return run.checkpoints / f"checkpoint-{plan.steps}"
            result = _save(trainer, run)
            held_out.evaluate("after")
        except Interrupted as interrupted:
            if not interrupted.hard:
                trainer.keep()
            raise
    return result


def _take_steps(trainer: SurvivingTrainer, checkpoint: Path | None) -> None:
    """Those that are left, if any are."""
    plan, over = trainer.recorder.plan, False
    if checkpoint:
        evaluates = plan.recipe.train.eval_strategy != "no" or (plan.leads_on and step_of(checkpoint) == plan.steps)
        if evaluates and trainer.recorder.is_evaluation_due(step_of(checkpoint)):
            trainer.catch_up(checkpoint)
        over = is_over(checkpoint, plan.steps, plan.recipe.train.early_stopping_patience)
    if checkpoint and (over or trainer.control.should_training_stop):
        trainer.finish(checkpoint)
    else:
        # torch has a thread of its own for the backward pass on a GPU, to which Python would be handed over.
        with torch.autograd.set_multithreading_enabled(world().size > 1):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.agree()


def training_arguments(plan: Plan, run: Run) -> TrainingArguments:
    """The TrainingArguments of a run: one device, its folders, and what the plan says."""
    arguments = {"run_name": plan.recipe.train.run_name or run.folder.name}
    made = TrainingArguments(**plan.training | arguments, output_dir=str(run.checkpoints))
    if made.n_gpu > 1:
        made._n_gpu = 1  # with several GPUs in sight the Trainer would wrap the model in DataParallel
    if plan.placement.sharded:
        blocks = find_blocks(plan.model.skeleton, plan.model.shape.layers)[1]
        made.fsdp_plugin_args = plugin_arguments(blocks)
    return made


def _load(recorder: Recorder, run: Run, offload: Offload | None) -> Any:
    """The base with its adapter, whose first state is kept where it changed the base."""
    plan = recorder.plan
    record_base(run, plan.model.loaded, plan.model.checkpoint.with_weights().base())
    gate = BitGate() if plan.placement.sharded else None
    if gate:
        model = load_for_sharding(plan.model, gate.note)
    else:
        model = load_offloaded(plan.model, offload) if offload else load_base(plan.model)
    if plan.model.held or plan.model.scheme.plugin:
        recorder.quantized_share = _share(plan, model)
    recorder.reach("after_load", "adapters")
    model = attach_adapter(model, plan, offload.bring if offload else None)
    recorder.balance = BalanceWatch(model)
    if offload:
        recorder.bytes_elsewhere = offload.bytes_elsewhere + look_up_on_host(model, offload.device)
    if gate is None:
        _try_rows(model, recorder)
    if plan.fewer_passes:
        join_adapters(model, offload.bring if offload else None)
    _divide_loss(model.get_base_model() if plan.lora else model, recorder)
    fuse(model, recorder)
    if _changes_base(plan) and not run.checkpoint:
        world().first_does(lambda: model.save_pretrained(str(run.initial_adapter)))
    if gate:
        gate.note(model)
        for _, weight in trained(model):
            weight.data = weight.data.to(model.device)
    recorder.gate = gate
    return model


def _try_rows(model: Any, recorder: Recorder) -> None:
    """Whether the loaded model needs a mask. Raises ModelError if examples that share a row would see each other."""
    recorder.unmasked = needs_no_mask(model)
    _require_apart(model, recorder.plan)


def _divide_loss(base: Any, recorder: Recorder) -> None:
    """Have the loss computed from few logits at a time, in one pass over them if the head allows it."""
    plan, weighted = recorder.plan, recorder.plan.data.weighted
    size = LOGITS if weighted and plan.logit_bytes is None else plan.logit_bytes
    if size is None:
        return
    always = plan.recipe.train.chunked_loss is True or weighted
    recorder.fused_loss = not plan.recipe.train.torch_compile and fuse_loss(base, size, always=always)
    if weighted and not recorder.fused_loss:
        name = plan.model.shape.architecture
        raise ModelError(
            f"{name} computes its loss by code of its own, in which tokens cannot be weighted: {UNWEIGHTED}"
        )
    if recorder.fused_loss or chunk_loss(base, rows_at_once(base, size)):
        recorder.logit_bytes = size
    else:
        recorder.view.note("The loss is computed from all logits of a batch at once, as the model's own code has it")


def _share(plan: Plan, model: Any) -> float:
    if plan.model.scheme.keeps_weights and plan.model.held:
        return plan.model.held.share
    return measured_share(model)


def _trainer(model: Any, run: Run, recorder: Recorder, signals: Signals) -> SurvivingTrainer:
    plan = recorder.plan
    trainer = SurvivingTrainer(
        recorder,
        signals,
        model=model,
        args=training_arguments(plan, run),
        train_dataset=_training_rows(recorder),
        eval_dataset=plan.data.eval and plan.data.eval.remove_columns("weights"),
        data_collator=_collator(plan, model),
        processing_class=plan.model.tokenizer,
        callbacks=_callbacks(plan, run, recorder),
    )
    trainer.remove_callback(PrinterCallback)
    if not trainer.model_accepts_loss_kwargs and plan.recipe.train.gradient_accumulation_steps > 1:
        raise ModelError(
            f"{plan.model.shape.architecture} averages its loss over each micro-batch, so accumulated gradients "
            "would weigh short rows more: set train.gradient_accumulation_steps to 1"
            + (", and distributed.gpus" if world().size > 1 else "")
        )
    return trainer


def _training_rows(recorder: Recorder) -> Any:
    """What batches are made of."""
    plan, known = recorder.plan, recorder.earlier.windows
    train, stream = plan.recipe.train, plan.data.stream
    if stream is None:
        return plan.data.batched
    shuffled = train.train_sampling_strategy != "sequential"
    return stream.asked(plan.steps * train.step_rows, shuffled=shuffled, ends=known)


def _collator(plan: Plan, model: Any) -> Collator:
    """A loss that balances experts would count the padding of packed rows, so that these are given none."""
    balances = getattr(model.config.get_text_config(), "output_router_logits", False)
    side_by_side = plan.recipe.data.padding_free or balances
    return Collator(
        pad_token_id(plan.model.tokenizer),
        most=plan.model.shape.position_table,
        pictures=plan.model.pictures,
        side_by_side=side_by_side,
        weighted=plan.data.weighted,
    )


def _require_apart(model: Any, plan: Plan) -> None:
    """Raise ModelError if examples that share a row would see each other."""
    data, exact = plan.recipe.data, plan.model.scheme.name != "8bit"
    if plan.recipe.data.is_packed and not packs_as_alone(model, plan.mixed, exact=exact):
        field = "data.packing" if data.packing else "data.padding_free"
        raise ModelError(
            f"{plan.model.checkpoint.path}: {plan.model.shape.architecture} answers otherwise where other examples "
            f"share a row: set {field} to false, or another model.attn_implementation"
        )


def _callbacks(plan: Plan, run: Run, recorder: Recorder) -> list[TrainerCallback]:
    patience, callbacks = plan.recipe.train.early_stopping_patience, [AskedLess()]
    if patience:
        callbacks.append(EarlyStoppingCallback(patience))
    if plan.recipe.quant.mode == "qat":
        callbacks.append(RoundingSchedule(plan.recipe.quant, plan.start))
    if plan.recipe.train.matmul == "fp8":
        callbacks.append(RoundedAnew(recorder.dither))
    if plan.leads_on:
        callbacks.append(Border(plan))
    if "tensorboard" in plan.recipe.train.report_to:
        callbacks.append(Events(run.events, recorder.view))
    return callbacks


def _save(trainer: SurvivingTrainer, run: Run) -> Path:
    plan, model = trainer.recorder.plan, trainer.accelerator.unwrap_model(trainer.model)
    world().first_does(lambda: require_ours(run.folder))
    if learnt := state_of(model):
        require_observed(learnt)
    if plan.lora is None:
        world().first_does(lambda: save_full(model, plan, run.full_model))
        return run.full_model
    initial = run.initial_adapter if _changes_base(plan) else None
    weights = gathered(model) if plan.placement.sharded else None
    world().first_does(lambda: save_adapter(model, plan, run.adapter, initial, weights))
    return run.adapter


def _changes_base(plan: Plan) -> bool:
    return plan.recipe.adapter.init_lora_weights.startswith(CHANGES_BASE)
