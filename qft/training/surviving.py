"""The Hugging Face Trainer, made to go on where memory runs out: with less at once, and the same numbers."""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, wraps
from typing import Any, NamedTuple, TypeVar

import torch

from qft.data.batch import Collator
from qft.documents.training import OutOfMemory
from qft.kernels import keep
from qft.machine.signals import Signals
from qft.memory.checkpointing import enable_checkpointing
from qft.memory.guard import asked_bytes, is_out_of_memory, let_go, memory_guard, smaller_evaluation, smaller_training
from qft.plan import Plan
from qft.training.recorder import Recorder
from qft.training.trainer import QftTrainer
from qft.training.undo import Drawn, Undo

T = TypeVar("T")
Batch = dict[str, Any]
ROWS, EVAL_ROWS = "train.per_device_train_batch_size", "train.per_device_eval_batch_size"
PHASES = {"": "evaluation", "data": "forward"}
"""What the clock does not call by the name of what was done."""
CHECKPOINTING, ANSWERED_ROWS = "train.gradient_checkpointing", "eval.batch_size"


def _checkpoints_all(plan: Plan, planned: Mapping[str, Any]) -> bool:
    """Whether no block keeps more than its input."""
    on = any(planned.get(f"{name}_checkpointing") for name in ("activation", "gradient"))
    return on and {*plan.kept} == {"inputs"}


class Remedy(NamedTuple):
    """One thing to do where memory runs out: to give a field of the recipe another value, while the training runs."""

    field: str
    less: Callable[[Any, int], Any]
    """From its value, and the rows of the largest batch that failed, to one that needs less memory; None: there is
    none."""
    apply: Callable[[Any], None] = lambda value: None
    """Make the value take effect, where it is not simply looked up."""


def halved(value: int, rows: int) -> int | None:
    """Half of what was really held at once."""
    held = min(value, rows)
    return -(-held // 2) if held > 1 else None


def rows_of(batch: Batch, start: int, stop: int, collator: Collator) -> Batch:
    """Some rows of a batch, padded as the collator would have padded them alone; the batch itself if those are all."""
    if start == 0 and stop >= len(batch["rows"]):
        return batch
    if "encoded" in batch:
        made, device = collator(batch["encoded"].rows[start:stop]), batch["input_ids"].device
        return {name: each.to(device) if isinstance(each, torch.Tensor) else each for name, each in made.items()}
    known = {name: batch[name][start:stop] for name in ("rows", "learnt_tokens", "lengths") if name in batch}
    tensors = {name: each for name, each in batch.items() if isinstance(each, torch.Tensor)}
    if len(batch["input_ids"]) < len(batch["rows"]):  # they lie side by side
        first, count = (sum(map(sum, batch["lengths"][part])) for part in (slice(start), slice(start, stop)))
        return known | {name: each[:, first : first + count].contiguous() for name, each in tensors.items()}
    longest = int(batch["attention_mask"][start:stop].sum(1).max())
    width = -(-longest // collator.multiple) * collator.multiple
    return known | {name: each[start:stop, :width].contiguous() for name, each in tensors.items()}


OF_AN_EVALUATION, OF_ANSWERS = [Remedy(EVAL_ROWS, halved)], [Remedy(ANSWERED_ROWS, halved)]


class SurvivingTrainer(QftTrainer):
    """Trainer that makes a step again, from its beginning and with less at once, if memory runs out in it.

    The loader's batches stay as they are, and so do their order, the steps and the epochs: each is passed through the
    model in parts. The loss of a step is a mean over all its tokens, however it is divided."""

    def __init__(self, recorder: Recorder, signals: Signals, **arguments: Any) -> None:
        super().__init__(recorder, signals, **arguments)
        recipe, planned = recorder.plan.recipe, vars(self.args)
        self.fits = recipe.memory.on_oom == "fit"
        self.settings: dict[str, Any] = {
            ROWS: planned["per_device_train_batch_size"],
            CHECKPOINTING: _checkpoints_all(recorder.plan, planned),
            EVAL_ROWS: planned["per_device_eval_batch_size"],
            ANSWERED_ROWS: recipe.eval.batch_size,
        }
        """What holds now, by the fields of the recipe."""
        self.of_a_step = [Remedy(ROWS, self._fewer_rows), Remedy(CHECKPOINTING, self._checkpointed, self._checkpoint)]
        """What is done where memory runs out in a step: the first that is left. Of each, `settings` has the value."""
        self._taken: list[Batch] = []
        """The loader's batches of the step under way, up to the one that is being passed."""
        self._told: Any = 0.0
        """The sum of their losses, as the Trainer was told."""
        self._updated = self._spoilt = False
        """Whether an update was made in this process; and whether one was cut off midway and cannot be taken back."""
        self._go_on_as_before()

    def _go_on_as_before(self) -> None:
        """As the part of the run did that is resumed."""
        remedies = {remedy.field: remedy for remedy in (*self.of_a_step, *OF_AN_EVALUATION, *OF_ANSWERS)}
        for field, now in {event.field: event.now for event in self.recorder.out_of_memory}.items():
            if isinstance(now, bool | str) or now < self.settings[field]:  # fewer may be asked for now
                self.recorder.view.note(f"Going on with {field} {now}, as since memory ran out")
                self._change(remedies[field], now)

    def _fewer_rows(self, value: int, rows: int) -> int | None:
        """Only where the loss of a batch is the sum of those of its parts: not where a model averages each micro-batch
        for itself, or balances the load of its experts over it."""
        balanced = getattr(self.model.config.get_text_config(), "output_router_logits", False)
        return halved(value, rows) if self.model_accepts_loss_kwargs and not balanced else None

    def _checkpointed(self, value: bool, _: int) -> bool | None:
        return True if not value and getattr(self.model, "supports_gradient_checkpointing", False) else None

    def _checkpoint(self, _: bool) -> None:
        enable_checkpointing(self.model)
        keep(self.recorder.keeps, ["inputs"] * len(self.recorder.keeps))

    @property
    def accumulation(self) -> int:
        """Forward passes in a whole optimizer step."""
        parts = -(-self.args.per_device_train_batch_size // int(self.settings[ROWS]))
        return int(self.args.gradient_accumulation_steps * parts)

    def still_to_do(self) -> Iterator[str]:
        """What lets the training take less, beside what holds now."""
        plan = self.recorder.plan
        holds = {field.removeprefix("train."): self.settings[field] for field in (ROWS, CHECKPOINTING)}
        recipe = plan.recipe.having(train=plan.recipe.train.having(**holds))
        yield from smaller_training(recipe, plan.model.scheme)

    # The step

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._taken, self._told = [], 0.0
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        if not self._taken:
            self._drawn = Drawn(self.args.device)
        self._taken.append(inputs)
        self._pass = partial(self._in_parts, super().training_step, model, num_items_in_batch)
        loss: torch.Tensor = self._survive_step(partial(self._pass, [inputs]), lambda: self._begin_again() - self._told)
        self._told = self._told + loss
        return loss

    def _in_parts(self, passed: Callable[..., torch.Tensor], model: Any, items: Any, batches: list[Batch]) -> Any:
        """The sum of the losses of `batches`, their gradients added up."""
        size = self.settings[ROWS]
        starts = ((batch, start) for batch in batches for start in range(0, len(batch["rows"]), size))
        parts = (rows_of(batch, start, start + size, self.data_collator) for batch, start in starts)
        return sum(passed(model, part, items) for part in parts)

    def _begin_again(self) -> Any:
        """The step from its beginning, by the same random numbers: all its batches up to this one."""
        self._drawn.restore()
        self.restart_update()
        return self._pass(self._taken)

    def _survive_step(self, work: Callable[[], T], again: Callable[[], T]) -> T:
        return self._survive(work, self.of_a_step, max(len(batch["rows"]) for batch in self._taken), again)

    # The update

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        step = self.optimizer.step

        @wraps(step)
        def update() -> None:
            self._survive_step(partial(self._update, step), lambda: self._update_again(step))
            self._updated |= not (self.update.skipped or self.optimizer.step_was_skipped)

        self.optimizer.step = update
        return prepared

    def _update(self, step: Callable[[], None]) -> None:
        undo = Undo(self.optimizer.optimizer, first=self.fits and not self._updated)
        try:
            step()
        except (RuntimeError, MemoryError):
            self._spoilt = not undo.take_back()
            raise

    def _update_again(self, step: Callable[[], None]) -> None:
        self._begin_again()
        norm = self._clip_grad_norm(self.model) if self.args.max_grad_norm > 0 else None
        self._get_grad_norm(self.model, grad_norm=norm)
        self.before_update()
        self._update(step)

    # Evaluations

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        predict, rows, done = partial(super().prediction_step, model), len(inputs["input_ids"]), 0

        def go_on() -> tuple[int, Any]:
            stop = done + self.settings[EVAL_ROWS]
            return stop, predict(rows_of(inputs, done, stop, self.data_collator), *args, **kwargs)

        while done < rows:
            done, outcome = self._survive_evaluation(go_on, OF_AN_EVALUATION, rows - done)
        return outcome

    def answering(self, answer: Callable[[int], T], rows: int) -> T:
        """What `answer` comes to of `rows`, told how many of them to take at once."""
        return self._survive_evaluation(lambda: answer(self.settings[ANSWERED_ROWS]), OF_ANSWERS, rows)

    def _survive_evaluation(self, work: Callable[[], T], remedies: list[Remedy], rows: int) -> T:
        plan, field = self.recorder.plan, remedies[0].field

        def smaller() -> Iterator[str]:  # as it is by then
            yield from smaller_evaluation(plan.recipe, plan.model.scheme, field, min(self.settings[field], rows))

        with memory_guard("evaluating held-out rows", smaller()):
            return self._survive(work, remedies, rows)

    def measure_checkpointing(self) -> tuple[int, float] | None:
        try:
            return super().measure_checkpointing()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            let_go(error)
        self.probe = None  # a figure is not worth a run
        return None

    # What is done about it

    def _survive(
        self, work: Callable[[], T], remedies: Iterable[Remedy], rows: int, again: Callable[[], T] | None = None
    ) -> T:
        """What `work` gives, or else `again` (None: the same), once memory has been made. `rows`: of the largest
        batch."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not self._give_way(error, remedies, rows):
                    raise
                let_go(error)
            self._free()
            work = again or work

    def _give_way(self, error: BaseException, remedies: Iterable[Remedy], rows: int) -> bool:
        """Do the first thing that is left, and tell of it; False: nothing is left, or asked for."""
        step, phase = self.state.global_step, PHASES.get(self.recorder.clock.phase, self.recorder.clock.phase)
        if not self.fits:
            return False
        if self._spoilt:
            self.recorder.view.note(f"step {step + 1}: memory ran out midway in the update, which cannot be made again")
            return False
        for remedy in remedies:
            was = self.settings[remedy.field]
            now = remedy.less(was, rows)
            if now is not None:
                self._change(remedy, now)
                event = OutOfMemory(
                    step=step + (phase != "evaluation"),
                    phase=phase,
                    asked_bytes=asked_bytes(error),
                    field=remedy.field,
                    was=was,
                    now=now,
                    gradient_accumulation_steps=self.accumulation,
                )
                self.recorder.survived(event)
                return True
        return False

    def _change(self, remedy: Remedy, value: Any) -> None:
        self.settings[remedy.field] = value
        remedy.apply(value)

    def _free(self) -> None:
        """Give back what the attempt that failed has left: gradients, and what allocators kept."""
        self.model.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()
        gc.collect()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.is_in_train and (scaler := self.accelerator.scaler) is not None:
            # Its scale stays; that these gradients were unscaled is forgotten, which only an update of the scale does.
            scaler.scale(torch.zeros(1, device=self.args.device))  # before the first backward pass it has none
            scaler.update(scaler.get_scale())
            self.optimizer._accelerate_step_called = False
