"""The Hugging Face Trainer, made to stop for a signal so that nothing but time is lost."""

import traceback
from typing import Any

from transformers import EarlyStoppingCallback

from qft.distributed.world import world
from qft.errors import Interrupted
from qft.machine.signals import Deaf, Signals
from qft.training.recorder import Recorder
from qft.training.resuming import ResumingTrainer

OTHERS = "SIGTERM"
"""What is said to have come where it came to another process."""


class StoppingTrainer(ResumingTrainer):
    """Trainer that finishes the step under way when a signal comes, and raises Interrupted behind it."""

    def __init__(self, recorder: Recorder, signals: Signals, **arguments: Any) -> None:
        super().__init__(recorder, **arguments)
        self.signals, self.saves = signals, recorder.plan.recipe.train.save_on_signal
        self.heard = False
        """Whether all processes know that a signal has come to one."""

    def agree(self) -> None:
        """Raise Interrupted if a signal has come to any process, in all of them."""
        if world().sums([self.signals.asked is not None])[0]:
            self.signals.asked = self.signals.asked or OTHERS
            self.signals.check()

    def keep(self) -> None:
        """Write a checkpoint of the step that was made last, unless there is one, or other processes go on."""
        if world().size > 1 and not self.heard:
            return
        has_best = self.args.load_best_model_at_end and not self.is_in_train  # whose weights are no longer that step's
        if self.saves and self.state.global_step > self.kept and not has_best:
            self.signals.waits = False  # a second one ends it
            self._save_checkpoint(self.model, None)
        if self.is_in_train:
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # which writes the curves out

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        except Interrupted as interrupted:
            # Workers end with the loop's iterator: left to the garbage collector, they are waited for in vain.
            traceback.clear_frames(interrupted.__traceback__)
            raise
        finally:
            self.signals.waits = False

    def get_train_dataloader(self) -> Any:
        return _deafened(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        return _deafened(super().get_eval_dataloader(*args, **kwargs))

    @property
    def stops(self) -> bool:
        """Whether a signal ends the training behind this step; with other processes, one that all have agreed on."""
        return self.heard if world().size > 1 else self.signals.asked is not None

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.saves:
            self.signals.wait("the step under way is finished and a checkpoint written")
        return super().training_step(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.stops:
            self.postponed, self.control.should_evaluate = self.control.should_evaluate, False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.stops:
            self.signals.asked = self.signals.asked or OTHERS
            self.signals.check()

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """A signal cuts it off, and then it has not begun."""
        if world().size > 1:  # the others would wait for this process: a signal is heard behind the next step
            return super().evaluate(*args, **kwargs)
        stopping = [each for each in self.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]
        waited = [each.early_stopping_patience_counter for each in stopping]
        try:
            with self.signals.at_once():
                return super().evaluate(*args, **kwargs)
        except Interrupted:
            self.postponed = True
            self.recorder.evaluations.pop(f"step-{self.state.global_step}", None)
            for each, count in zip(stopping, waited, strict=True):
                each.early_stopping_patience_counter = count
            raise


def _deafened(loader: Any) -> Any:
    """With workers that leave signals to this process."""
    within = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
    within.worker_init_fn = Deaf(within.worker_init_fn)
    return loader
