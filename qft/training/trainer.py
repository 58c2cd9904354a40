"""The Hugging Face Trainer, made to watch each step: phases, tokens, and numbers that are not finite.

Hooks are overridden and nothing is rewritten: what a step is (accumulation, clipping, the loss over all its tokens)
stays the Trainer's.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from qft.data.sources import some_places
from qft.distributed.rows import Filled, FilledBatches, real
from qft.distributed.sharded import whole
from qft.distributed.world import world
from qft.errors import Elsewhere, ModelError, NonFiniteError
from qft.machine.signals import Signals
from qft.memory.checkpointing import CheckpointingProbe, checkpoint_first
from qft.memory.fused_loss import COUNTS
from qft.memory.meter import optimizer_bytes, tensor_bytes
from qft.memory.stash import stash_inputs
from qft.memory.unmasked import one_row_each
from qft.model.adapter import CHANGES_BASE
from qft.model.distill import distilled_loss
from qft.model.on_cpu import short_attention
from qft.progress import Step
from qft.training.recorder import Recorder
from qft.training.stopping import StoppingTrainer


@dataclass
class _Update:
    """What is noted of one optimizer step on its way; what its micro-batches give stays on the device until read."""

    started: float = field(default_factory=time.perf_counter)
    losses: list[torch.Tensor] = field(default_factory=list)
    counts: list[torch.Tensor] = field(default_factory=list)
    """Tokens, supervised ones, and rows."""
    rows: list[torch.Tensor] = field(default_factory=list)
    padded_tokens: int = 0
    grad_norm: Any = 0.0
    learning_rate: float = 0.0
    numbers: list[float] = field(default_factory=list)
    """The losses, the norm, and the two sums of the counts, once they are read."""
    sums: list[float] = field(default_factory=list)
    """Of all processes: losses, whether a number is not finite, signals, tokens, supervised ones, padded ones, rows."""
    skipped: bool = False
    asked: bool = False
    """Whether a signal has come to any process."""

    def read(self) -> None:
        """Fetch the numbers together, waiting for the device once."""
        losses = torch.stack(self.losses).double()
        norm = torch.as_tensor(self.grad_norm).to(losses).reshape(1)
        counts = torch.stack(self.counts).sum(0).to(losses)
        self.numbers = torch.cat([losses, norm, counts]).tolist()

    def tell(self, *, wrong: bool, asked: bool) -> None:
        """Add up with the other processes what was read. The loss of each is times their number, as the Trainer has it,
        whose gradients are averaged."""
        *losses, _, tokens, supervised, rows = self.numbers
        own = [sum(losses) / world().size, wrong, asked, tokens, supervised, self.padded_tokens, rows]
        self.sums = world().sums(own)
        self.asked = bool(self.sums[2])


class QftTrainer(StoppingTrainer):
    """Trainer that tells a recorder each Step, and stops before an update that is not finite."""

    def __init__(self, recorder: Recorder, signals: Signals, **arguments: Any) -> None:
        super().__init__(recorder, signals, **arguments)
        self.mixed = recorder.plan.mixed if world().size > 1 else None
        """Of an autocast beside accelerate's, which leaves it to FSDP2, that must cast nothing, and which is not asked
        for an evaluation before the training."""
        self.on_nonfinite = recorder.plan.recipe.train.on_nonfinite
        self.probe = CheckpointingProbe(self.model) if recorder.plan.recipe.train.gradient_checkpointing else None
        self.update = _Update()
        self._evaluated = [0.0, 0]
        self._not_finite: list[torch.Tensor] = []
        """Held-out rows, of a batch whose loss is not finite."""
        self.add_callback(_StepWatch(self))

    def restart_update(self) -> None:
        """The step is made again: forget what was noted of it."""
        self.update = _Update(self.update.started)
        if self.probe and self.recorder.recomputed is None:
            self.probe = CheckpointingProbe(self.model)  # what the other noted may have been too large

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.update = _Update()
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
        rows = real(inputs["rows"])
        tokens = (inputs["attention_mask"].sum(1) * rows).sum()
        self.update.counts.append(torch.stack([tokens, (inputs["labels"][:, 1:] >= 0).sum(), rows.sum()]))
        self.update.padded_tokens += inputs["input_ids"].numel()
        self.recorder.largest_micro_batch = max(self.recorder.largest_micro_batch, inputs["input_ids"].numel())
        with short_attention() if self.recorder.plan.fewer_passes else nullcontext(), one_row_each():
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.update.losses.append(loss)
        # The Trainer keeps a running sum, which one NaN would spoil for good; the watch below has seen it already.
        return torch.nan_to_num(loss, 0.0, 0.0, 0.0) if self.on_nonfinite == "skip" else loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        rows, counts = inputs.pop("rows"), inputs.pop("learnt_tokens")
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
        self.update.rows.append(rows)
        if self.recorder.unmasked:
            del inputs["attention_mask"]
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
            self._not_finite.append(rows)
        return loss, logits, labels

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loop, with the loss averaged over tokens: a mean over batches would count short rows more.
        Raises NonFiniteError."""
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
            vars(self.model)["_ddp_params_and_buffers_to_ignore"] = names
        prepared = super()._prepare_for_training(*args, **kwargs)
        if world().size > 1 and not isinstance(prepared[0], DistributedDataParallel | FSDPModule):
            raise ModelError("accelerate has left the model as it is, and no gradients would be shared")
        if self.recorder.gate:
            self.recorder.gate.arm()
            self.recorder.sharded(self.model)
        return prepared

    def _leave_unprepared(self) -> None:
        """Before the training each process evaluates with all weights: of a model that it has prepared for that,
        accelerate would later share no gradients, nor shard it."""
        if world().size > 1 and not self.accelerator._models:
            self.accelerator._models.append(self.model)

    def before_update(self) -> None:
        """Look at what the step came to, and refuse its update if that is not finite."""
        update, recorder = self.update, self.recorder
        recorder.clock.enter("optimizer")
        if recorder.gate and not recorder.steps[len(recorder.earlier.steps) :]:
            recorder.gate.require()
        if not recorder.bytes["gradients"]:
            gradients = (p.grad for p in self.model.parameters() if p.grad is not None)
            recorder.bytes["gradients"] = tensor_bytes(gradients)
        update.learning_rate = self.lr_scheduler.get_last_lr()[0]
        update.read()
        recorder.clock.settle()
        *losses, norm, _, _, _ = update.numbers
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        update.tell(wrong=bool(bad), asked=self.signals.asked is not None)
        # Under loss scaling an overflowing gradient is everyday: the scaler itself skips the step and lowers its scale.
        if update.sums[1] or (not math.isfinite(norm) and not self.args.fp16):
            self._refuse_update([update.rows[i] for i in bad] if update.sums[1] else update.rows)

    def _refuse_update(self, rows: list[torch.Tensor]) -> None:
        """Skip the update, or end the training; `rows` are those of this process whose loss is not finite, or all."""
        if self.on_nonfinite == "stop":
            what = "the loss" if self.update.sums[1] else "the gradient norm"
            self._refuse(
                f"step {self.state.global_step + 1}: {what} is not finite, and the update was not made. {{}}. "
                "Look at them, lower train.learning_rate, or set train.on_nonfinite: skip",
                rows,
            )
        self.update.skipped = True
        self.model.zero_grad(set_to_none=True)  # without gradients the optimizer changes nothing, decay included

    def _refuse(self, text: str, rows: list[torch.Tensor]) -> None:
        """End all processes; the first says `text`, with the rows of all."""
        own = [tuple(row) for part in rows for row in part[real(part)].tolist()]
        found = [each for of_rank in world().gather(own) for each in of_rank]
        if not world().first:
            raise Elsewhere(NonFiniteError.exit_code)
        place = self.recorder.plan.data.place
        raise NonFiniteError(text.format(f"Rows of the batch: {some_places([place(*each) for each in found])}"))

    def after_update(self) -> None:
        """Tell the recorder of the step."""
        update, recorder = self.update, self.recorder
        recorder.clock.enter("")
        if not recorder.bytes["optimizer_state"]:
            recorder.bytes["optimizer_state"] = optimizer_bytes(self.optimizer.optimizer)
        loss, _, _, tokens, supervised, padded, rows = update.sums
        step = Step(
            step=self.state.global_step,
            loss=loss,
            learning_rate=update.learning_rate,
            grad_norm=update.numbers[-4],
            tokens=int(tokens),
            padded_tokens=int(padded),
            supervised_tokens=int(supervised),
            rows=int(rows),
            seconds=time.perf_counter() - update.started,
            memory=recorder.look().device,
            peak_memory=recorder.meter.peak().device,
            skipped=update.skipped,
        )
        if recorder.recomputed is None:
            recorder.recomputed = self.measure_checkpointing()
        recorder.step(step)

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
        if recorder.plan.recomputed is not None and not all_since:
            checkpoint_first(self.trainer.model, recorder.plan.recomputed)
        if recorder.plan.checkpoints == "host":
            stash_inputs(self.trainer.model, self.trainer.args.device)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.before_update()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.after_update()
