"""The Hugging Face Trainer, made to watch each step: phases, tokens, and numbers that are not finite.

Hooks are overridden and nothing is rewritten: what a step is (accumulation, clipping, the loss over all its tokens)
stays the Trainer's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from qft.errors import NonFiniteError
from qft.memory.meter import Meter, optimizer_bytes, tensor_bytes
from qft.progress import Step
from qft.training.clock import PhaseClock

__all__ = ["QftTrainer"]

SHOWN_ROWS = 16


class QftTrainer(Trainer):
    """Trainer that reports each Step to `on_step` and stops before an update that is not finite."""

    def __init__(
        self,
        *,
        on_step: Callable[[Step], None],
        on_nonfinite: str,
        place: Callable[[int, int], str],
        meter: Meter,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.on_step, self.on_nonfinite, self.place, self.meter = on_step, on_nonfinite, place, meter
        self.clock = PhaseClock(meter.on_gpu)
        self.gradient_bytes = self.optimizer_bytes = 0
        self.skipped_steps = 0
        self._evaluated = [0.0, 0]
        self._begin_step()
        self.add_callback(_StepWatch(self))

    def _begin_step(self) -> None:
        self._started = time.perf_counter()
        self._losses: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []
        self._rows: list[torch.Tensor] = []
        self._padded = 0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._begin_step()
        self.clock.enter("data")
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.clock.enter("forward")
        self._counts.append(torch.stack([inputs["attention_mask"].sum(), (inputs["labels"][:, 1:] >= 0).sum()]))
        self._padded += inputs["input_ids"].numel()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        # The Trainer keeps a running sum, which one NaN would spoil for good; the watch below has seen it already.
        return torch.nan_to_num(loss, 0.0, 0.0, 0.0) if self.on_nonfinite == "skip" else loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        rows = inputs.pop("rows")
        if not model.training:
            # Smoothing is a device of training; what is evaluated is the plain loss.
            smoother = self.label_smoother  # type: ignore[has-type]
            self.label_smoother = None
            try:
                return super().compute_loss(model, inputs, *args, **kwargs)
            finally:
                self.label_smoother = smoother
        self._rows.append(rows)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.clock.enter("backward")
        return loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        tokens = int((inputs["labels"][:, 1:] >= 0).sum())
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        self._evaluated[0] += float(loss) * tokens
        self._evaluated[1] += tokens
        return loss, logits, labels

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loop, with the loss averaged over tokens: a mean over batches would count short rows more."""
        self._evaluated = [0.0, 0]
        self.clock.enter("")
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        total, tokens = self._evaluated
        output.metrics[f"{prefix}_loss"] = total / tokens if tokens else math.nan
        output.metrics[f"{prefix}_tokens"] = tokens
        return output

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The Trainer's norm before clipping, noted."""
        self._norm = super()._get_grad_norm(model, grad_norm)
        return self._norm

    def before_update(self) -> None:
        """Look at the step's losses and gradient norm together, waiting for the device once."""
        self.clock.enter("optimizer")
        if not self.gradient_bytes:
            self.gradient_bytes = tensor_bytes(p.grad for p in self.model.parameters() if p.grad is not None)
        self._learning_rate = self.lr_scheduler.get_last_lr()[0]
        losses = torch.stack(self._losses).double()
        norm = torch.as_tensor(self._norm).to(losses).reshape(1)
        self._numbers = torch.cat([losses, norm, torch.stack(self._counts).sum(0).to(losses)]).tolist()
        self.clock.settle()
        *each, norm, _, _ = self._numbers
        bad = [i for i, loss in enumerate(each) if not math.isfinite(loss)]
        # Under loss scaling an overflowing gradient is everyday: the scaler itself skips the step and lowers its scale.
        self._bad = bool(bad) or (not math.isfinite(norm) and not self.args.fp16)
        if self._bad:
            self._refuse_update(bad)

    def _refuse_update(self, bad: list[int]) -> None:
        if self.on_nonfinite == "stop":
            step = self.state.global_step + 1
            what = "the loss" if bad else "the gradient norm"
            rows = torch.cat([self._rows[i] for i in bad] if bad else self._rows).tolist()
            places = ", ".join(self.place(source, row) for source, row in rows[:SHOWN_ROWS])
            more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
            raise NonFiniteError(
                f"step {step}: {what} is not finite, and the update was not made. Rows of the batch: {places}{more}. "
                "Look at them, lower train.learning_rate, or set train.on_nonfinite: skip"
            )
        self.skipped_steps += 1
        self.model.zero_grad(set_to_none=True)  # without gradients the optimizer changes nothing, decay included

    def after_update(self) -> None:
        self.clock.enter("")
        self.optimizer_bytes = self.optimizer_bytes or optimizer_bytes(self.optimizer.optimizer)
        *each, norm, tokens, supervised = self._numbers
        memory, peak = self.meter.now(), self.meter.peak()
        on_gpu = self.meter.on_gpu
        self.on_step(
            Step(
                step=self.state.global_step,
                loss=sum(each),
                learning_rate=self._learning_rate,
                grad_norm=norm,
                tokens=int(tokens),
                padded_tokens=self._padded,
                supervised_tokens=int(supervised),
                rows=sum(len(rows) for rows in self._rows),
                seconds=time.perf_counter() - self._started,
                memory=memory.gpu if on_gpu else memory.host,
                peak_memory=peak.gpu if on_gpu else peak.host,
                skipped=self._bad,
            )
        )


class _StepWatch(TrainerCallback):
    """Carries the Trainer's events back to it."""

    def __init__(self, trainer: QftTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.before_update()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.after_update()
