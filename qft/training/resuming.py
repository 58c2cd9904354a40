"""The Hugging Face Trainer, made to go on from a checkpoint as if it had not stopped, by what the recipe says now."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler

from qft.errors import RunError
from qft.files import write_text
from qft.plan import Plan
from qft.run.checkpoint import STATE, TRAINER_STATE, best_of
from qft.run.resume import ANEW
from qft.training.recorder import Recorder


class ResumingTrainer(Trainer):
    """Trainer whose checkpoints hold all that the rest of the training, and the report, come of."""

    def __init__(self, recorder: Recorder, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.recorder = recorder
        self.order = torch.Generator()
        """Draws the order of rows that are grouped by length; the library draws the other one by epoch itself."""
        self.add_callback(_EpochOrder(self.order, recorder.plan))

    def finish(self, checkpoint: Path) -> None:
        """Instead of `train`, if that had come to its end by this checkpoint: take the weights that it came to."""
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        best = best_of(checkpoint) if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(str(best or checkpoint))

    def untouched_random(self) -> Any:
        """A context that draws numbers and leaves those that the training draws as they were."""
        return torch.random.fork_rng(devices=[self.args.device] if self.args.device.type == "cuda" else [])

    def train(self, resume_from_checkpoint: Any = None, **options: Any) -> Any:
        self._resumed = resume_from_checkpoint and Path(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, **options)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            # From the global generator, as is, a resumed run would draw another order.
            sampler.generator = self.order
        return sampler

    def _load_callback_state(self) -> None:
        """After the checkpoint's TrainerState was taken up: what is asked now stands above what was asked then.

        The library's own way to restore callbacks would bring the old patience back with what was waited."""
        state = self.state
        state.compute_steps(self.args, state.max_steps)
        best = self._resumed and best_of(self._resumed)
        state.best_model_checkpoint = str(best) if best else None  # a run may have been moved
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                saved = state.stateful_callbacks.setdefault("EarlyStoppingCallback", callback.state())
                callback.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        """The checkpoint's state, with the hyperparameters that are asked now."""
        if checkpoint is None:
            return
        optimizer, scheduler = self.optimizer, self.lr_scheduler
        asked = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        base_lrs = scheduler.base_lrs
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler.base_lrs = base_lrs
        factors = (factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas)
        scheduler._last_lr = [base * factor for base, factor in zip(base_lrs, factors, strict=True)]
        for group, settings, rate in zip(optimizer.param_groups, asked, scheduler._last_lr, strict=True):
            group.update(settings | {"lr": rate})

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Full weights by the names of the model's modules: by those the library loads a checkpoint, and no others."""
        model = self.model
        if isinstance(model, PreTrainedModel):
            model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            model.__dict__.pop("save_pretrained", None)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Weights that a checkpoint lacks, tied ones aside, would silently stay what they were."""
        missing, wrong = set(load_result.missing_keys), list(load_result.unexpected_keys)
        if missing:
            state = self.model.state_dict()
            loaded = {tensor.data_ptr() for name, tensor in state.items() if name not in missing}
            wrong += [name for name in missing if state[name].data_ptr() not in loaded]
        if wrong:
            text = f"{len(wrong)} weights of the checkpoint are not those of the model, {min(wrong)} among them"
            raise RunError(f"{text}; use a checkpoint of this model, {ANEW}")

    def _save_rng_state(self, output_dir: str) -> None:
        """Before trainer_state.json, which makes the checkpoint whole: what was measured so far."""
        super()._save_rng_state(output_dir)
        write_text(Path(output_dir) / STATE, self.recorder.state().model_dump_json())


class _EpochOrder(TrainerCallback):
    """Makes the order of an epoch's rows depend on the seed and the epoch alone."""

    def __init__(self, order: torch.Generator, plan: Plan) -> None:
        self.order, self.plan = order, plan

    def on_epoch_begin(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
        self.order.manual_seed(args.seed + state.global_step // self.plan.steps_per_epoch)
