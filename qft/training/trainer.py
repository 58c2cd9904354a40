"""The Hugging Face Trainer, made to watch each step: phases, tokens, and numbers that are not finite.

Hooks are overridden and nothing is rewritten: what a step is (accumulation, clipping, the loss over all its tokens)
stays the Trainer's.
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback

from qft.data.sources import some_places
from qft.errors import NonFiniteError
from qft.machine.signals import Signals
from qft.memory.checkpointing import CheckpointingProbe, checkpoint_first
from qft.memory.fused_loss import COUNTS
from qft.memory.meter import optimizer_bytes, tensor_bytes
from qft.memory.packed import sequences_apart
from qft.memory.stash import stash_inputs
from qft.memory.unmasked import one_row_each
from qft.model.distill import distilled_loss
from qft.model.on_cpu import short_attention
from qft.progress import Step
from qft.training.recorder import Recorder
from qft.training.stopping import StoppingTrainer

Places = tuple[tuple[int, int], ...]
"""Source and row of each."""


@dataclass
class _Update:
    """What is noted of one optimizer step on its way; what its micro-batches give stays on the device until read."""

    started: float = field(default_factory=time.perf_counter)
    losses: list[torch.Tensor] = field(default_factory=list)
    counts: list[torch.Tensor] = field(default_factory=list)
    """Tokens, and supervised ones."""
    rows: list[Places] = field(default_factory=list)
    """Of each micro-batch, the rows that it has."""
    padded_tokens: int = 0
    grad_norm: Any = 0.0
    learning_rate: float = 0.0
    numbers: list[float] = field(default_factory=list)
    """The losses, the norm, and the two sums of the counts, once they are read."""
    skipped: bool = False

    def read(self) -> None:
        """Fetch the numbers together, waiting for the device once."""
        losses = torch.stack(self.losses).double()
        norm = torch.as_tensor(self.grad_norm).to(losses).reshape(1)
        self.numbers = torch.cat([losses, norm, torch.stack(self.counts).sum(0).to(losses)]).tolist()


class QftTrainer(StoppingTrainer):
    """Trainer that tells a recorder each Step, and stops before an update that is not finite."""

    def __init__(self, recorder: Recorder, signals: Signals, **arguments: Any) -> None:
        super().__init__(recorder, signals, **arguments)
        self.on_nonfinite = recorder.plan.recipe.train.on_nonfinite
        self.probe = CheckpointingProbe(self.model) if recorder.plan.recipe.train.gradient_checkpointing else None
        self.update = _Update()
        self._evaluated = [0.0, 0]
        self._not_finite: list[Places] = []
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

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.recorder.clock.enter("forward")
        self.update.counts.append(torch.stack([inputs["attention_mask"].sum(), (inputs["labels"][:, 1:] >= 0).sum()]))
        self.update.padded_tokens += inputs["input_ids"].numel()
        self.recorder.largest_micro_batch = max(self.recorder.largest_micro_batch, inputs["input_ids"].numel())
        short = short_attention() if self.recorder.plan.fewer_passes else nullcontext()
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
        self.update.rows.append(sum(rows, ()))
        packed = "position_ids" in inputs
        if self.recorder.unmasked or packed:
            del inputs["attention_mask"]
        if packed:
            inputs["use_cache"] = False  # with one, transformers takes a row for one sequence
        if share := self.recorder.plan.recipe.quant.distill:
            loss = distilled_loss(model, inputs, kwargs.get("num_items_in_batch"), float(share))
        else:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.recorder.clock.enter("backward")
        return loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        tokens = int((inputs["labels"][:, 1:] >= 0).sum())
        rows = inputs["rows"]
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if tokens:
            self._evaluated[0] += float(loss) * tokens
            self._evaluated[1] += tokens
        if tokens and not math.isfinite(loss):
            self._not_finite.append(sum(rows, ()))
        return loss, logits, labels

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loop, with the loss averaged over tokens: a mean over batches would count short rows more.
        Raises NonFiniteError."""
        self._evaluated, self._not_finite = [0.0, 0], []
        self.recorder.clock.enter("")
        with self.untouched_random():  # so that when it is evaluated changes nothing of what is learnt
            output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        if self._not_finite:
            raise NonFiniteError(
                f"step {self.state.global_step}: the loss of held-out rows is not finite. "
                f"{self._rows_told(self._not_finite)}. Look at them, or hold the model in another model.dtype"
            )
        total, tokens = self._evaluated
        output.metrics.update(eval_loss=total / tokens if tokens else math.nan, eval_tokens=tokens)
        return output

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The Trainer's norm before clipping, noted."""
        self.update.grad_norm = super()._get_grad_norm(model, grad_norm)
        return self.update.grad_norm

    def before_update(self) -> None:
        """Look at what the step came to, and refuse its update if that is not finite."""
        update, recorder = self.update, self.recorder
        recorder.clock.enter("optimizer")
        if not recorder.bytes["gradients"]:
            gradients = (p.grad for p in self.model.parameters() if p.grad is not None)
            recorder.bytes["gradients"] = tensor_bytes(gradients)
        update.learning_rate = self.lr_scheduler.get_last_lr()[0]
        update.read()
        recorder.clock.settle()
        *losses, norm, _, _ = update.numbers
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        # Under loss scaling an overflowing gradient is everyday: the scaler itself skips the step and lowers its scale.
        if bad or (not math.isfinite(norm) and not self.args.fp16):
            self._refuse_update(bad)

    def _refuse_update(self, bad: list[int]) -> None:
        """Skip the update, or end the training; `bad` are the micro-batches whose loss is not finite."""
        if self.on_nonfinite == "stop":
            step, rows = self.state.global_step + 1, self.update.rows
            what = "the loss" if bad else "the gradient norm"
            told = self._rows_told([rows[i] for i in bad] if bad else rows)
            raise NonFiniteError(
                f"step {step}: {what} is not finite, and the update was not made. {told}. "
                "Look at them, lower train.learning_rate, or set train.on_nonfinite: skip"
            )
        self.update.skipped = True
        self.model.zero_grad(set_to_none=True)  # without gradients the optimizer changes nothing, decay included

    def _rows_told(self, rows: list[Places]) -> str:
        place = self.recorder.plan.data.place
        return f"Rows of the batch: {some_places([place(source, row) for source, row in sum(rows, ())])}"

    def after_update(self) -> None:
        """Tell the recorder of the step."""
        update, recorder = self.update, self.recorder
        recorder.clock.enter("")
        if not recorder.bytes["optimizer_state"]:
            recorder.bytes["optimizer_state"] = optimizer_bytes(self.optimizer.optimizer)
        *losses, norm, tokens, supervised = update.numbers
        step = Step(
            step=self.state.global_step,
            loss=sum(losses),
            learning_rate=update.learning_rate,
            grad_norm=norm,
            tokens=int(tokens),
            padded_tokens=update.padded_tokens,
            supervised_tokens=int(supervised),
            rows=sum(len(rows) for rows in update.rows),
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
