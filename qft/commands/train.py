"""`qft train`: Recipe -> Plan -> Run -> Report."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft.helpers import disable_input_dtype_casting
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from qft.calibration.skip_auto import choose_skip_modules, skipped_before
from qft.data.batch import Collator, pad_token_id
from qft.documents.training import (
    Checkpointing,
    Components,
    Evaluation,
    Evaluations,
    Memory,
    ModelPart,
    Phases,
    Report,
    SkippedModules,
)
from qft.errors import ModelError, QftError
from qft.files import write_json, write_text
from qft.measure.scores import Answer, answer_rows, as_jsonl, score
from qft.memory.checkpointing import CheckpointingProbe
from qft.memory.guard import memory_guard, smaller_training
from qft.memory.meter import Meter, Snapshot, weight_bytes
from qft.model.adapter import CHANGES_BASE, attach_adapter, save_adapter, save_full
from qft.model.load import load_base
from qft.plan import Plan, make_plan, with_skip_modules
from qft.progress import Step, View
from qft.recipe import LoadedRecipe
from qft.run.folder import Run, check_folder, record_base, start_run, step_of
from qft.training import summary
from qft.training.advice import advise
from qft.training.trainer import QftTrainer
from qft.views.html.page import AnswerPair, training_page

__all__ = ["train"]


def train(loaded: LoadedRecipe, view: View, *, resume: bool = False, overwrite: bool = False) -> Report:
    """Train as the recipe says and write the run folder.

    Raises QftError: RunError before any work if the folder forbids it, then whatever `make_plan` refuses, then
    NonFiniteError or OutOfMemoryError from the training itself. The last good checkpoint is kept in every case.
    """
    started = time.perf_counter()
    check_folder(Path(loaded.recipe.output_dir), resume=resume, overwrite=overwrite)
    view.note("Reading the data and the model's configuration")
    plan = make_plan(loaded)
    skipped = None
    if plan.recipe.quant.skip_modules == "auto":
        skipped = skipped_before(Path(loaded.recipe.output_dir)) if resume else choose_skip_modules(plan, view)
        plan = with_skip_modules(plan, skipped.names)
    run = start_run(plan, resume=resume, overwrite=overwrite)
    if skipped:
        run.set_status("running", skipped_modules=skipped.model_dump(mode="json"))
    with run.failure_noted():
        training = _Training(plan, run, view, started, skipped)
        report = training.run_all(resume=resume)
    write_json(run.report, report.model_dump(mode="json"))
    run.set_status("complete")
    write_text(run.page, training_page(report, training.answer_pairs()))  # last: a picture must not cost a result
    return report


@dataclass
class _Training:
    """One training, from the plan to its report."""

    plan: Plan
    run: Run
    view: View
    started: float
    skipped_modules: SkippedModules | None = None
    checkpointing: tuple[int, float] | None = None
    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    """To the held-out rows, by the moment: before, step-N, after."""

    def run_all(self, *, resume: bool) -> Report:
        plan, recipe = self.plan, self.plan.recipe
        set_seed(recipe.seed)
        checkpoint = self.run.newest_checkpoint() if resume else None
        with Meter(plan.model.device.kind) as meter:
            self.view.note(f"Loading {plan.model.checkpoint.path}")
            model = load_base(plan.model)
            record_base(self.run, plan.model)
            model = attach_adapter(model, plan)
            if self._changes_base and not resume:
                model.save_pretrained(str(self.run.initial_adapter))
            self.probe = CheckpointingProbe(model) if recipe.train.gradient_checkpointing else None
            self.trainer = self._trainer(model, meter)
            weights, self.after_load = weight_bytes(model), meter.settled()
            # Under autocast a LoRA layer need not cast its input to float32 first, which would be kept for backward.
            mixed = plan.training["bf16"] or plan.training["fp16"]
            remedies = smaller_training(recipe, plan.model.scheme)
            with memory_guard("training", remedies), disable_input_dtype_casting(model, active=mixed):
                before = self._evaluate_all("before", 0) if checkpoint is None else self._earlier_evaluation()
                self.view.begin(plan.steps, step_of(checkpoint))
                meter.restart()
                self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                self.peak = meter.peak()
                self.trainer.clock.settle()
                at_end = meter.now()
                result = self._save()
                after = self._evaluate_all("after", self.trainer.state.global_step)
        return self._report(weights, at_end, result, before, after)

    @property
    def _held_out(self) -> Dataset:
        if self.plan.data.eval is None:
            raise QftError("no rows were held out")
        return self.plan.data.eval

    @property
    def _changes_base(self) -> bool:
        return self.plan.recipe.adapter.init_lora_weights.startswith(CHANGES_BASE)

    def _trainer(self, model: Any, meter: Meter) -> QftTrainer:
        plan = self.plan
        arguments = training_arguments(plan, self.run)
        trainer = QftTrainer(
            on_step=self._on_step,
            on_nonfinite=plan.recipe.train.on_nonfinite,
            place=plan.data.place,
            meter=meter,
            model=model,
            args=arguments,
            train_dataset=plan.data.train,
            eval_dataset=plan.data.eval,
            data_collator=Collator(pad_token_id(plan.model.tokenizer)),
            processing_class=plan.model.tokenizer,
            callbacks=self._callbacks(),
        )
        trainer.remove_callback(PrinterCallback)
        if not trainer.model_accepts_loss_kwargs and plan.recipe.train.gradient_accumulation_steps > 1:
            raise ModelError(
                f"{plan.model.shape.architecture} averages its loss over each micro-batch, so accumulated gradients "
                "would weigh short rows more: set train.gradient_accumulation_steps to 1"
            )
        return trainer

    def _callbacks(self) -> list[TrainerCallback]:
        train = self.plan.recipe.train
        callbacks: list[TrainerCallback] = [_Evaluations(self)]
        if train.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(train.early_stopping_patience))
        if "tensorboard" in train.report_to:
            tensorboard = TensorBoardCallback()
            tensorboard.logging_dir = str(self.run.events)
            callbacks.append(tensorboard)
        return callbacks

    def _on_step(self, step: Step) -> None:
        if not self.steps:
            self.after_first_step = self.trainer.meter.now()
            if self.probe:
                with self.trainer.accelerator.autocast():
                    self.checkpointing = self.probe.measure()
        self.steps.append(step)
        self.view.step(step)

    def _evaluate_all(self, moment: str, step: int) -> Evaluation | None:
        """Loss and scores of the held-out rows; None without any."""
        plan = self.plan
        if plan.data.eval is None:
            return None
        self.view.note(f"Evaluating {len(plan.data.eval)} held-out rows {moment} training")
        # Not `evaluate`: its callbacks would take this for one of the evaluations within the training.
        loader = self.trainer.get_eval_dataloader()
        metrics = self.trainer.evaluation_loop(loader, moment, prediction_loss_only=True).metrics
        evaluation = self._evaluation(step, metrics["eval_loss"], metrics["eval_tokens"], self._scores(moment))
        self._tell(evaluation)
        write_json(self.run.folder / f"eval-{moment}.json", evaluation.model_dump(mode="json"))
        return evaluation

    def _scores(self, moment: str) -> dict[str, float]:
        """Scores of the answers to the held-out rows, which are kept as `moment`.jsonl."""
        plan, settings = self.plan, self.plan.recipe.eval
        if not settings.metrics:
            return {}
        with self.trainer.accelerator.autocast():
            answers = answer_rows(
                self.trainer.model,
                plan.model.tokenizer,
                self._held_out,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                samples=settings.samples,
            )
        self.answers[moment] = answers
        write_text(self.run.answers / f"{moment}.jsonl", as_jsonl(answers, plan.data.place))
        return {name: score(name, answers, pattern=settings.regex).value for name in settings.metrics}

    def answer_pairs(self) -> list[AnswerPair]:
        """The answers before and after, side by side; a resumed run has none from before."""
        after = self.answers.get("after", [])
        before: Sequence[Answer | None] = self.answers.get("before") or [None] * len(after)
        return [
            AnswerPair(
                place=self.plan.data.place(new.source, new.row),
                prompt=new.prompt,
                expected=new.expected,
                before=old.given if old else None,
                after=new.given,
                before_right=old.right if old else None,
                after_right=new.right,
            )
            for old, new in zip(before, after, strict=True)
        ]

    def _evaluation(self, step: int, loss: float, tokens: int, scores: dict[str, float]) -> Evaluation:
        rows = len(self._held_out)
        return Evaluation(step=step, loss=loss, perplexity=_exp(loss), tokens=tokens, rows=rows, scores=scores)

    def _earlier_evaluation(self) -> Evaluation | None:
        path = self.run.folder / "eval-before.json"
        return Evaluation.model_validate_json(path.read_text("utf-8")) if path.exists() else None

    def _tell(self, evaluation: Evaluation) -> None:
        self.view.evaluated(evaluation.step, evaluation.loss, evaluation.perplexity, evaluation.scores)

    def note_evaluation(self, metrics: dict[str, float]) -> None:
        """An evaluation within the training."""
        step = self.trainer.state.global_step
        scores = self._scores(f"step-{step}")
        evaluation = self._evaluation(step, metrics["eval_loss"], int(metrics["eval_tokens"]), scores)
        self.evaluations.append(evaluation)
        self._tell(evaluation)

    def _save(self) -> Path:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if self.plan.lora is None:
            save_full(model, self.plan, self.run.full_model)
            return self.run.full_model
        save_adapter(model, self.plan, self.run.adapter, self.run.initial_adapter if self._changes_base else None)
        return self.run.adapter

    def _report(
        self,
        weights: dict[str, int],
        at_end: Snapshot,
        result: Path,
        before: Evaluation | None,
        after: Evaluation | None,
    ) -> Report:
        plan, steps = self.plan, self.steps
        report = Report(
            run=str(self.run.folder),
            result=str(result),
            model=self._model_part(weights),
            throughput=summary.throughput(steps),
            phases=Phases(**self.trainer.clock.shares()),
            memory=self._memory_part(weights, at_end),
            skipped_modules=self.skipped_modules,
            checkpointing=self._checkpointing_part(),
            loss=summary.loss(steps),
            eval=Evaluations(before=before, after=after, history=self.evaluations),
            lengths=summary.lengths(plan.data.train["length"]),
            steps=len(steps),
            skipped_steps=self.trainer.skipped_steps,
            samples=sum(step.rows for step in steps),
            tokens=sum(step.tokens for step in steps),
            supervised_tokens=sum(step.supervised_tokens for step in steps),
            wall_seconds=time.perf_counter() - self.started,
            advice=[],
        )
        advice = advise(
            report,
            device_kind=plan.model.device.kind,
            has_eval=plan.data.eval is not None,
        )
        return report.model_copy(update={"advice": advice})

    def _model_part(self, weights: dict[str, int]) -> ModelPart:
        plan, shape = self.plan, self.plan.model.shape
        base = weights["frozen"] if plan.lora else weights["trainable"]
        return ModelPart(
            path=plan.model.checkpoint.path,
            architecture=shape.architecture,
            device=plan.model.device.name,
            scheme=plan.model.scheme,
            quant_type=(plan.model.quantization or plan.model.checkpoint.quantization).get("bnb_4bit_quant_type"),
            dtype=plan.model.dtype,
            parameters=shape.parameters,
            trainable_parameters=shape.trainable_parameters,
            trainable_share=shape.trainable_parameters / shape.parameters,
            bits_per_weight=base * 8 / shape.parameters,
        )

    def _checkpointing_part(self) -> Checkpointing | None:
        if self.checkpointing is None:
            return None
        saved, seconds = self.checkpointing
        again = seconds * self.plan.recipe.train.gradient_accumulation_steps
        step = statistics.median(step.seconds for step in self.steps)
        return Checkpointing(saved_bytes=saved, cost_share=again / max(step - again, again))

    def _memory_part(self, weights: dict[str, int], at_end: Snapshot) -> Memory:
        on_gpu = self.plan.model.device.kind == "cuda"
        trainer, peak = self.trainer, self.peak
        held = trainer.gradient_bytes + trainer.optimizer_bytes
        # On a GPU the peak holds the weights too; on the host, only what came since they were loaded is told apart.
        base = sum(weights.values()) if on_gpu else self.after_load.host
        activations = (peak.gpu if on_gpu else peak.host) - base - held
        moments = [s.gpu if on_gpu else s.host for s in (self.after_load, self.after_first_step, at_end)]
        return Memory(
            peak_gpu_bytes=peak.gpu,
            peak_gpu_reserved_bytes=peak.gpu_reserved,
            peak_host_bytes=peak.host,
            device_bytes=self.plan.model.device.total_bytes,
            after_load_bytes=moments[0],
            after_first_step_bytes=moments[1],
            at_end_bytes=moments[2],
            history=[(step.step, step.memory, step.peak_memory) for step in self.steps],
            growing=summary.growing([step.memory for step in self.steps]),
            components=Components(
                base_weights=weights["frozen"],
                trainable_weights=weights["trainable"],
                gradients=trainer.gradient_bytes,
                optimizer_state=trainer.optimizer_bytes,
                activations=max(activations, 0),
            ),
        )


class _Evaluations(TrainerCallback):
    """Carries evaluations within the training to the report and the view."""

    def __init__(self, training: _Training) -> None:
        self.training = training

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if "eval_loss" in metrics:
            self.training.note_evaluation(metrics)


def training_arguments(plan: Plan, run: Run) -> TrainingArguments:
    """The TrainingArguments of a run: one device, its folders, and what the plan says."""
    arguments = {"run_name": plan.recipe.train.run_name or run.folder.name}
    made = TrainingArguments(**plan.training | arguments, output_dir=str(run.checkpoints))
    if made.n_gpu > 1:
        made._n_gpu = 1  # with several GPUs in sight the Trainer would wrap the model in DataParallel
    return made


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))
