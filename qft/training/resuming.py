"""The Hugging Face Trainer, made to go on from a checkpoint as if it had not stopped, by what the recipe says now."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler

from qft.data.packing import PackedRows
from qft.data.stream import Stream
from qft.distributed.sharded import gathered, gathered_state, scatter, scattered_state
from qft.distributed.world import world
from qft.errors import RunError
from qft.files import write_text
from qft.model.rounded import read_learnt, write_learnt
from qft.plan import Plan
from qft.quant.rounded import measure_scales
from qft.run.checkpoint import INITIAL, STATE, TRAINER_STATE, best_of, best_problem, discard, rotate, seal, step_of
from qft.run.lock import require_ours
from qft.run.resume import ANEW
from qft.training.recorder import Recorder


class ResumingTrainer(Trainer):
    """Trainer whose checkpoints hold all that the rest of the training, and the report, come of."""

    def __init__(self, recorder: Recorder, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.recorder, self.sharded = recorder, recorder.plan.placement.sharded
        self.order = torch.Generator()
        """Draws the order of rows that are grouped by length; the library draws the other one by epoch itself."""
        self.keeps, self.args.save_total_limit = self.args.save_total_limit, None
        """Checkpoints to keep: the library would count damaged ones, and in the end leave none to finish from."""
        self.kept = 0
        """Step of the newest checkpoint."""
        self.postponed = False
        """Whether the evaluation of this step is left to whoever goes on."""
        self._ops_of_a_token: int | None = None
        self._caught_up: dict[str, Any] = {}
        """What is in the Trainer's state by an evaluation that was made since."""
        self.add_callback(_EpochOrder(self.order, recorder.plan))

    def take_up(self, checkpoint: Path) -> None:
        """Take the weights that the stage before came to, and what else it has left."""
        self._take_state(checkpoint)
        self._load_from_checkpoint(str(checkpoint))

    def finish(self, checkpoint: Path) -> None:
        """Instead of `train`, if that had come to its end by this checkpoint: take the weights that it came to."""
        if not self._caught_up:
            self._take_state(checkpoint)
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best or str(checkpoint))

    def catch_up(self, checkpoint: Path) -> None:
        """Make the evaluation before which the checkpoint was written, with all that follows from it."""
        self.take_up(checkpoint)
        if self._determine_best_metric(self.evaluate(), None) and self.is_asked(self.kept):
            self.state.best_model_checkpoint = str(checkpoint)
        names = ("best_metric", "best_global_step", "best_model_checkpoint")
        self._caught_up = {name: getattr(self.state, name) for name in names}

    def _take_state(self, checkpoint: Path) -> None:
        self._resumed, self.kept = checkpoint, step_of(checkpoint)
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        self._load_callback_state()

    def ends_epoch(self, step: int) -> bool:
        return step % self.recorder.plan.steps_per_epoch == 0 or step == self.recorder.plan.steps

    def is_asked(self, step: int) -> bool:
        """Whether the recipe asks for a checkpoint behind that step."""
        train = self.recorder.plan.recipe.train
        if train.save_strategy == "steps":
            return step % train.save_steps == 0 or step == self.recorder.plan.steps
        return train.save_strategy == "epoch" and self.ends_epoch(step)

    def untouched_random(self) -> Any:
        """A context that draws numbers and leaves those that the training draws as they were."""
        return torch.random.fork_rng(devices=[self.args.device] if self.args.device.type == "cuda" else [])

    def train(self, resume_from_checkpoint: Any = None, **options: Any) -> Any:
        self._resumed = resume_from_checkpoint and Path(resume_from_checkpoint)
        self.kept = step_of(self._resumed)
        return super().train(resume_from_checkpoint, **options)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        rows, sizes = self.train_dataset, self.args
        if isinstance(rows, Stream):
            return SequentialSampler(rows)
        if isinstance(rows, PackedRows) and sizes.train_sampling_strategy == "group_by_length":
            at_once = sizes.train_batch_size * sizes.gradient_accumulation_steps * world().size
            return LengthGroupedSampler(at_once, lengths=rows.lengths.tolist(), generator=self.order)
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size *= world().size  # the rows of an update, on all GPUs
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
                if not self._caught_up:
                    waited = saved["attributes"]["early_stopping_patience_counter"]
                    callback.early_stopping_patience_counter = waited
        for name, value in self._caught_up.items():
            setattr(state, name, value)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Over all stages that the schedule has, not only this one."""
        span = self.recorder.plan.span
        return super().create_scheduler(span.schedule_steps if span else num_training_steps, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        """The checkpoint's state, with the hyperparameters that are asked now."""
        if checkpoint is None:
            return
        span = self.recorder.plan.span
        begins = span if span and step_of(Path(checkpoint)) == span.start else None
        optimizer, scheduler = self.optimizer, self.lr_scheduler
        asked = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        base_lrs = scheduler.base_lrs
        if self.sharded:
            self._load_sharded_optimizer(Path(checkpoint))
        elif begins and begins.reset_optimizer:
            scheduler.load_state_dict(torch.load(Path(checkpoint, "scheduler.pt"), weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if begins and begins.reset_lr_scheduler:
            scheduler.last_epoch = 0
        scheduler.base_lrs = base_lrs
        factors = (factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas)
        scheduler._last_lr = [base * factor for base, factor in zip(base_lrs, factors, strict=True)]
        for group, settings, rate in zip(optimizer.param_groups, asked, scheduler._last_lr, strict=True):
            group.update(settings | {"lr": rate})

    def _load_sharded_optimizer(self, checkpoint: Path) -> None:
        """What one process alone would load, and so one may that goes on where several were."""
        state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.load_state_dict(scattered_state(state, parameters))
        self.lr_scheduler.load_state_dict(torch.load(checkpoint / "scheduler.pt", weights_only=True))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Of sharded weights, those that are trained and their state as one process alone would write them."""
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        weights, state = gathered(self.model), gathered_state(self.optimizer.optimizer)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)
            torch.save(state, Path(output_dir, "optimizer.pt"))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, "scheduler.pt"))

    def _load_scaler(self, checkpoint: Any) -> None:
        """None that scales: the checkpoint is of a stage in another precision."""
        if self.accelerator.scaler is not None:
            super()._load_scaler(checkpoint)

    def _clip_grad_norm(self, model: Any) -> Any:
        """The Trainer's, of what is trained: to go through a model of adapters for it takes milliseconds."""
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        return self.accelerator.clip_grad_norm_(weights, self.args.max_grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The library's, which goes through all parameters of the model each time: the device waits for that."""
        if self._ops_of_a_token is None:
            self._ops_of_a_token = super().floating_point_ops(inputs) // max(inputs["input_ids"].numel(), 1)
        return self._ops_of_a_token * int(inputs["input_ids"].numel())

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Full weights by the names of the model's modules: by those the library loads a checkpoint, and no others."""
        if self.sharded and state_dict is None:  # which are gathered with the optimizer's state
            return
        model = self.model
        if isinstance(model, PreTrainedModel):
            model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            model.__dict__.pop("save_pretrained", None)
        write_learnt(model, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.sharded:
            self._scatter_from(Path(resume_from_checkpoint))
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._begins_rounding(step_of(Path(resume_from_checkpoint))):
            measure_scales(self.model)
        else:
            read_learnt(self.model, Path(resume_from_checkpoint))

    def _begins_rounding(self, step: int) -> bool:
        """Whether that step ended a stage that has not learnt what this one learns of how it rounds."""
        span = self.recorder.plan.span
        if not span or step != span.start:
            return False
        before, now = self.recorder.stages[span.number - 2 : span.number]
        return before.model.scheme.learnt_as != now.model.scheme.learnt_as

    def _scatter_from(self, checkpoint: Path) -> None:
        """Take the adapter of a checkpoint, whether the model is sharded yet or not."""
        known = {name.replace(".default.", "."): name for name, p in self.model.named_parameters() if p.requires_grad}
        tensors = load_file(checkpoint / "adapter_model.safetensors")
        if wrong := scatter({known.get(name, name): tensor for name, tensor in tensors.items()}, self.model):
            text = f"{len(wrong)} weights of the checkpoint are not those of the model, {wrong[0]} among them"
            raise RunError(f"{text}; use a checkpoint of this model, {ANEW}")

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

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The library's, its hashes, and then fewer old ones."""
        folder = Path(self.args.output_dir)
        checkpoint, initial = folder / f"checkpoint-{self.state.global_step}", folder / INITIAL

        def begun() -> None:
            require_ours(folder.parent)
            discard(checkpoint)  # a damaged one would lend it its other files

        world().first_does(begun)
        self._best_before = self.state.best_model_checkpoint
        super()._save_checkpoint(model, trial)
        world().wait()
        self.kept = self.state.global_step
        best = self.state.best_model_checkpoint

        def sealed() -> None:
            seal(checkpoint, *([initial] if initial.exists() else []))
            rotate(checkpoint, self.keeps, Path(best) if best else None)

        world().first_does(sealed)

    def _save_rng_state(self, output_dir: str) -> None:
        """Before trainer_state.json: what was measured so far, and which checkpoint is the best."""
        super()._save_rng_state(output_dir)
        best = self.state.best_global_step
        if best and not self.is_asked(best):
            self.state.best_model_checkpoint = self._best_before
        if not world().first:
            return
        rows, due = self.train_dataset, self._is_evaluation_due()
        windows = rows.ends if isinstance(rows, Stream) else []
        state = self.recorder.state().model_copy(update={"evaluation_due": due, "windows": windows})
        write_text(Path(output_dir) / STATE, state.model_dump_json())

    def _is_evaluation_due(self) -> bool:
        """An epoch is evaluated behind the checkpoint of its last step."""
        step, by_epochs = self.state.global_step, self.args.eval_strategy == "epoch"
        due = self.postponed or self.control.should_evaluate or (by_epochs and self.ends_epoch(step))
        return due and f"step-{step}" not in self.recorder.evaluations

    def _load_best_model(self) -> None:
        if problem := best_problem(Path(self.state.best_model_checkpoint)):
            raise RunError(f"train.load_best_model_at_end: {problem}, and --resume")
        if self.sharded:
            self._scatter_from(Path(self.state.best_model_checkpoint))
            return
        super()._load_best_model()
        read_learnt(self.model, Path(self.state.best_model_checkpoint))


class _EpochOrder(TrainerCallback):
    """Makes the order of an epoch's rows depend on the seed and the epoch alone."""

    def __init__(self, order: torch.Generator, plan: Plan) -> None:
        self.order, self.plan = order, plan

    def on_epoch_begin(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
        self.order.manual_seed(args.seed + state.global_step // self.plan.steps_per_epoch)
