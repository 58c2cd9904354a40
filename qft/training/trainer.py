"""The Hugging Face Trainer, made to watch each step: phases, tokens, and numbers that are not finite.

Hooks are overridden and nothing is rewritten: what a step is (accumulation, clipping, the loss over all its tokens)
stays the Trainer's.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from qft.data.sources import some_places
from qft.distributed.rows import Filled, FilledBatches, Places, real
from qft.distributed.sharded import whole
from qft.distributed.world import world
from qft.errors import Elsewhere, ModelError, NonFiniteError
from qft.kernels import keep
from qft.machine.signals import Signals
from qft.memory.checkpointing import CheckpointingProbe, checkpoint_first
from qft.memory.distilled_loss import distilled_loss
from qft.memory.fused_loss import COUNTS, WEIGHTS
from qft.memory.meter import optimizer_bytes, tensor_bytes
from qft.memory.packed import sequences_apart
from qft.memory.stash import stash_inputs
from qft.memory.unmasked import one_row_each
from qft.model.adapter import CHANGES_BASE
from qft.model.on_cpu import short_attention
from qft.progress import Step
from qft.training.recorder import Recorder
from qft.training.sharding import reshard
from qft.training.update import LogEntry, Moment, Update, skips_by_itself
from qft.training.weighing import WeighingTrainer

OF_TEXT = {"input_ids", "attention_mask", "labels", COUNTS, WEIGHTS}
"""What a batch without images is made of."""


class QftTrainer(WeighingTrainer):
    """Trainer that tells a recorder each Step, and stops before an update that is not finite."""

    def __init__(self, recorder: Recorder, signals: Signals, **arguments: Any) -> None:
        super().__init__(recorder, signals, **arguments)
        self.mixed = recorder.plan.mixed if world().size > 1 else None
        """Of an autocast beside accelerate's, which leaves it to FSDP2, that must cast nothing, and which is not asked
        for an evaluation before the training."""
        self.on_nonfinite = recorder.plan.recipe.train.on_nonfinite
        self.probe = CheckpointingProbe(self.model) if "inputs" in recorder.plan.kept else None
        self.update = self._new_update()
        self._waiting: list[Update] = []
        """Updates that were made, or left out, and not told yet."""
        self._evaluated = [0.0, 0]
        self._not_finite: list[Places] = []
        """Held-out rows, of a batch whose loss is not finite."""
        self.add_callback(_StepWatch(self))

    def _new_update(self) -> Update:
        return Update(Moment(self.args.device.type == "cuda"))

    def restart_update(self) -> None:
        """The step is made again: forget what was noted of it."""
        self.update = Update(self.update.started)
        if self.probe and self.recorder.recomputed is None:
            self.probe = CheckpointingProbe(self.model)  # what the other noted may have been too large

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.update = self._new_update()
        self.recorder.clock.enter("data")
        return super().get_batch_samples(*args, **kwargs)

    def _get_dataloader(self, dataset: Any, *args: Any, sampler_fn: Any = None, **kwargs: Any) -> Any:
        """The library's, of which each process takes its batches: as many as the others, each row once."""
        if world().size == 1:
            return super()._get_dataloader(dataset, *args, sampler_fn=sampler_fn, **kwargs)
        draw = sampler_fn and (lambda filled: sampler_fn(filled.rows))
        loader = super()._get_dataloader(Filled(dataset), *args, sampler_fn=draw, **kwargs)
        shard = loader.batch_sampler
        shard.batch_sampler = FilledBatches(shard.batch_sampler, world().size)
        return loader

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.recorder.clock.enter("forward")
        mask, fillers = inputs["attention_mask"], [i for i, row in enumerate(inputs["rows"]) if not real(row)]
        of_fillers = sum(sum(inputs["lengths"][i]) for i in fillers) if "lengths" in inputs else mask[fillers].sum()
        tokens = mask.sum() - of_fillers if fillers else mask.sum()
        self.update.counts.append(torch.stack([tokens, (inputs["labels"][:, 1:] >= 0).sum()]))
        self.update.row_count += sum(len(real(row)) for row in inputs["rows"])
        self.update.padded_tokens += inputs["input_ids"].numel()
        self.recorder.largest_micro_batch = max(self.recorder.largest_micro_batch, inputs["input_ids"].numel())
        short = short_attention() if self.recorder.plan.fewer_passes else nullcontext()
        inputs = dict(inputs)  # where memory runs out, the batch is passed again
        with short, self._told_apart(inputs) as told:
            inputs.update(told)
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.update.losses.append(loss)
        # The Trainer keeps a running sum, which one NaN would spoil for good; the watch below has seen it already.
        return torch.nan_to_num(loss, 0.0, 0.0, 0.0) if self.on_nonfinite == "skip" else loss

    def _told_apart(self, inputs: dict[str, Any]) -> AbstractContextManager[dict[str, Any]]:
        """In which no row, nor any sequence of a packed one, is seen by another; gives what else the model is told."""
        lengths = inputs.pop("lengths", None)
        if lengths is None:
            return one_row_each()
        rows, width = inputs["input_ids"].shape
        return sequences_apart([sum(lengths, ())] if rows < len(lengths) else lengths, self.model, width)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        rows, counts, _ = inputs.pop("rows"), inputs.pop("learnt_tokens"), inputs.pop("encoded", None)
        if self.recorder.fused_loss:
            inputs[COUNTS] = counts
        if not model.training:
            # Smoothing is a device of training; what is evaluated is the plain loss.
            smoother = self.label_smoother  # type: ignore[has-type]
            self.label_smoother = None
            try:
                return super().compute_loss(model, inputs, *args, **kwargs)
            finally:
                self.label_smoother = smoother
        self.update.rows.append(sum(rows, ()))
        packed = "position_ids" in inputs
        if packed or (self.recorder.unmasked and inputs.keys() <= OF_TEXT):
            del inputs["attention_mask"]
        if packed:
            inputs["use_cache"] = False  # with one, transformers takes a row for one sequence
        if share := self.recorder.plan.recipe.quant.distill:
            loss = distilled_loss(model, inputs, kwargs.get("num_items_in_batch"), float(share))
        else:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.recorder.clock.enter("backward")
        return loss

    def compute_loss_context_manager(self) -> Any:
        entered = super().compute_loss_context_manager()
        if self.mixed:
            entered.enter_context(torch.autocast(self.args.device.type, dtype=self.mixed))
        return entered

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        tokens = int((inputs["labels"][:, 1:] >= 0).sum())
        rows = inputs["rows"]
        shared, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:  # of this process's rows alone: sums are added up in the end
            loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        finally:
            self.args.average_tokens_across_devices = shared
        if tokens:
            self._evaluated[0] += float(loss) * tokens
            self._evaluated[1] += tokens
        if tokens and not math.isfinite(loss):
            self._not_finite.append(sum(rows, ()))
        return loss, logits, labels

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loop, with the loss averaged over tokens: a mean over batches would count short rows more.
        Raises NonFiniteError."""
        self.tell()
        self._evaluated, self._not_finite = [0.0, 0], []
        self._leave_unprepared()
        self.recorder.clock.enter("")
        with self.untouched_random():  # so that when it is evaluated changes nothing of what is learnt
            output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        total, tokens, wrong = world().sums([*self._evaluated, len(self._not_finite)])
        if wrong:
            self._refuse(
                f"step {self.state.global_step}: the loss of held-out rows is not finite. {{}}. "
                "Look at them, or hold the model in another model.dtype",
                self._not_finite,
            )
        output.metrics.update(eval_loss=total / tokens if tokens else math.nan, eval_tokens=tokens)
        return output

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The Trainer's norm before clipping, noted."""
        self.update.grad_norm = whole(super()._get_grad_norm(model, grad_norm))
        return self.update.grad_norm

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.recorder.plan
        if plan.placement.strategy == "ddp" and not plan.recipe.adapter.init_lora_weights.startswith(CHANGES_BASE):
            # Each process has loaded the same: DDP would send all of it from one to the others.
            frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad]
            names = [*frozen, *(name for name, _ in self.model.named_buffers())]
            self.model._ddp_params_and_buffers_to_ignore = names
        if plan.placement.strategy == "ddp":
            # Gradients lie in the buckets that are reduced: no step copies them back, one kernel a weight.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        if self.sharded:
            reshard(self.model)
        prepared = super()._prepare_for_training(*args, **kwargs)
        if world().size > 1 and not isinstance(prepared[0], DistributedDataParallel | FSDPModule):
            raise ModelError("accelerate has left the model as it is, and no gradients would be shared")
        return prepared

    def _leave_unprepared(self) -> None:
        """Before the training of a model that it has prepared to be evaluated, accelerate would later share no
        gradients."""
        if world().size > 1 and not self.accelerator._models:
            self.accelerator._models.append(self.model)

    def before_update(self) -> None:
        """Look at what the step came to, and refuse its update if that is not finite. Where the optimizer can leave it
        out by itself, it is looked at when the next step is on its way: the device need not wait for the host."""
        update, recorder = self.update, self.recorder
        recorder.clock.enter("optimizer")
        if recorder.gate and not recorder.steps[len(recorder.earlier.steps) :]:
            recorder.gate.require()
        if not recorder.bytes["gradients"]:
            gradients = (p.grad for p in self.model.parameters() if p.grad is not None)
            recorder.bytes["gradients"] = tensor_bytes(gradients)
        update.learning_rate = self.lr_scheduler.get_last_lr()[0]
        bad = update.ask(self._tr_loss, asked=self.signals.asked is not None)
        if self._waits_for_nothing():
            self.optimizer.optimizer.found_inf = bad.float()
        else:
            self._look_at(update)
            if update.skipped:
                self.model.zero_grad(set_to_none=True)  # without gradients nothing is changed, decay included

    def _waits_for_nothing(self) -> bool:
        on_gpu = self.args.device.type == "cuda" and not self.args.fp16 and not self.sharded
        return on_gpu and skips_by_itself(self.optimizer.optimizer)

    def _look_at(self, update: Update) -> None:
        """Raises NonFiniteError, or has the update skipped, if what it was made of is not finite."""
        update.read()
        self.heard |= update.asked
        if not update.is_bad(scaled=self.args.fp16):
            return
        if self.on_nonfinite == "stop":
            step, some, rows = update.step or self.state.global_step + 1, update.sums[1], update.rows
            what = "the loss" if some else "the gradient norm"
            self._refuse(
                f"step {step}: {what} is not finite, and the update was not made. {{}}. "
                "Look at them, lower train.learning_rate, or set train.on_nonfinite: skip",
                [rows[i] for i in update.bad_batches] if some else rows,
            )
        update.skipped = True

    def _refuse(self, text: str, rows: list[Places]) -> None:
        """End all processes; the first says `text`, with the rows of all."""
        found = [each for of_rank in world().gather(real(sum(rows, ()))) for each in of_rank]
        if not world().first:
            raise Elsewhere(NonFiniteError.exit_code)
        place = self.recorder.plan.data.place
        raise NonFiniteError(text.format(f"Rows of the batch: {some_places([place(*each) for each in found])}"))

    def after_update(self) -> None:
        """Tell the recorder of the step, or, where it would have to be waited for, of the one before it."""
        update, recorder = self.update, self.recorder
        recorder.clock.enter("")
        if not recorder.bytes["optimizer_state"]:
            recorder.bytes["optimizer_state"] = optimizer_bytes(self.optimizer.optimizer)
        update.step, update.ended = self.state.global_step, Moment(self.args.device.type == "cuda")
        update.memory, update.peak_memory = recorder.look().device, recorder.meter.peak().device
        self._waiting.append(update)
        if recorder.recomputed is None:
            recorder.recomputed = self.measure_checkpointing()
        control, last = self.control, self.state.global_step >= self.state.max_steps
        asked = control.should_save or control.should_evaluate or control.should_training_stop
        self.tell(all_but=0 if asked or last or not self._waits_for_nothing() else 1)

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, which would wait for the loss: of a step that is told later, so is the log's entry."""
        steps = self.state.global_step - self._globalstep_last_logged  # type: ignore[has-type]
        if self._waiting and self.control.should_log and steps:
            self._waiting[-1].entry = LogEntry(steps, args[5], self.state.epoch)
            tr_loss -= tr_loss
            self._globalstep_last_logged, self.control.should_log = self.state.global_step, False
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _log(self, update: Update, entry: LogEntry) -> None:
        """As the Trainer would have, had it waited."""
        now, asked, loss = (self.state.global_step, self.state.epoch), self.control.should_log, update.sums[2]
        self._total_loss_scalar += loss
        self.store_flos()
        self.state.global_step, self.state.epoch = update.step, entry.epoch
        norm = update.numbers[len(update.losses)]
        told = {"loss": loss / entry.steps, "grad_norm": norm, "learning_rate": update.learning_rate}
        self.log(told, entry.start_time)
        (self.state.global_step, self.state.epoch), self.control.should_log = now, asked  # which an entry takes back

    def tell(self, all_but: int = 0) -> None:
        """The recorder of what was done, but for so many steps. Raises NonFiniteError as _look_at does."""
        while len(self._waiting) > all_but:
            update = self._waiting.pop(0)
            self._look_at(update)
            assert update.ended
            update.ended.wait()
            self.recorder.clock.settle()
            loss, _, _, tokens, supervised, padded, rows, _ = update.sums
            self.recorder.step(
                Step(
                    step=update.step,
                    loss=loss,
                    learning_rate=update.learning_rate,
                    grad_norm=update.numbers[len(update.losses)],
                    tokens=int(tokens),
                    padded_tokens=int(padded),
                    supervised_tokens=int(supervised),
                    rows=int(rows),
                    seconds=update.ended.seconds_since(update.started),
                    memory=update.memory,
                    peak_memory=update.peak_memory,
                    skipped=update.skipped,
                )
            )
            if update.entry:
                self._log(update, update.entry)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.tell()
        super()._save_checkpoint(*args, **kwargs)

    def measure_checkpointing(self) -> tuple[int, float] | None:
        """Bytes that checkpointing saves, and its seconds in one step; None where that is not measured."""
        if self.probe is None:
            return None
        with self.accelerator.autocast(), self.untouched_random():
            saved, seconds = self.probe.measure()
        return saved, seconds * len(self.update.losses)


class _StepWatch(TrainerCallback):
    """Carries the Trainer's events back to it."""

    def __init__(self, trainer: QftTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        recorder = self.trainer.recorder
        all_since = any(event.field == "train.gradient_checkpointing" for event in recorder.out_of_memory)
        kept = recorder.plan.kept
        if recorder.plan.ways and not all_since:
            checkpoint_first(self.trainer.model, kept.count("inputs"))
        on_host = recorder.plan.checkpoints == "host"
        stash = stash_inputs(self.trainer.model, self.trainer.args.device) if on_host else None
        if recorder.keeps and not all_since:
            keep(recorder.keeps, kept, stash)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.before_update()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.after_update()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.tell()
