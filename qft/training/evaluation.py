"""The held-out rows, asked before, within and after a training."""

import math
from typing import Any

from transformers import TrainerCallback

from qft.distributed.world import world
from qft.documents.training import Evaluation
from qft.files import write_json, write_text
from qft.measure.scores import Answer, answer_rows, as_jsonl, score
from qft.run.folder import Run
from qft.training.recorder import stage_moment
from qft.training.surviving import SurvivingTrainer


class HeldOut(TrainerCallback):
    """Evaluates the held-out rows, if there are any: their loss, and the scores of the answers to them."""

    def __init__(self, trainer: SurvivingTrainer, run: Run) -> None:
        self.trainer, self.run = trainer, run
        self.recorder, self.plan = trainer.recorder, trainer.recorder.plan
        trainer.add_callback(self)

    def evaluate(self, moment: str) -> None:
        """Evaluate `before` or `after` the training, and keep it as eval-`moment`.json; or before a later stage, which
        the next checkpoint tells of."""
        if self.plan.data.eval is None:
            return
        self.recorder.meter.settled()  # what was freed before would be resident beside it
        self.recorder.meter.enter(f"evaluate_{moment}")
        self.recorder.view.note(f"Evaluating {len(self.plan.data.eval)} held-out rows {moment} training")
        # Not `evaluate`: its callbacks would take this for one of the evaluations within the training.
        loader = self.trainer.get_eval_dataloader()
        metrics = self.trainer.evaluation_loop(loader, moment, prediction_loss_only=True).metrics
        if moment == "before" and self.plan.start:
            self._evaluated(stage_moment(self.plan), metrics)
            return
        evaluation = self._evaluated(moment, metrics)
        path = self.run.folder / f"eval-{moment}.json"
        world().first_does(lambda: write_json(path, evaluation.model_dump(mode="json")))

    def recall(self, moment: str) -> None:
        """Take up the evaluation that the run made before it was cut off, where its checkpoint does not tell of it."""
        path = self.run.folder / f"eval-{moment}.json"
        if moment in self.recorder.evaluations or not path.exists():
            return
        try:
            self.recorder.evaluations[moment] = Evaluation.model_validate_json(path.read_text("utf-8"))
        except (OSError, ValueError):
            self.recorder.view.note(f"{path} cannot be read: the report goes without it")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if "eval_loss" in metrics:
            self._evaluated(f"step-{state.global_step}", metrics)

    def _evaluated(self, moment: str, metrics: dict[str, float]) -> Evaluation:
        settings, loss = self.plan.recipe.eval, metrics["eval_loss"]
        answers = self._answers(moment) if settings.metrics else []
        evaluation = Evaluation(
            step=self.trainer.state.global_step,
            loss=loss,
            perplexity=math.exp(min(loss, 700.0)),
            tokens=int(metrics["eval_tokens"]),
            rows=len(self.plan.data.eval or ()),
            scores={name: score(name, answers, pattern=settings.regex).value for name in settings.metrics},
        )
        self.recorder.evaluated(moment, evaluation, answers)
        return evaluation

    def _answers(self, moment: str) -> list[Answer]:
        """The model's answers, kept as answers/`moment`.jsonl."""
        tokenizer, rows, asked = self.plan.model.tokenizer, self.plan.data.eval, self.plan.recipe.eval
        starts = rows["answer_start"][: asked.samples] if rows else []
        mine = world().share([i for i, start in enumerate(starts) if start > 0])

        def answered(at_once: int) -> list[Answer]:
            settings = asked.having(batch_size=at_once, samples=None)
            with self.trainer.accelerator.autocast():
                pictures = self.plan.model.pictures
                return answer_rows(self.trainer.model, tokenizer, rows.select(mine), settings, pictures) if rows else []

        own = self.trainer.answering(answered, len(mine))
        parts = world().gather(own)
        answers = [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]
        path, text = self.run.answers / f"{moment}.jsonl", as_jsonl(answers, self.plan.data.place)
        world().first_does(lambda: write_text(path, text))
        return answers
