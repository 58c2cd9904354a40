"""A model quantized, judged on held-out rows by calibrate.accept, and written once it is accepted."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import set_seed

from qft.calibration.blockwise import BlockQuantizer
from qft.calibration.quantizer import Quantizer, QuantizeTask, Trial
from qft.calibration.source import Source
from qft.calibration.whole import WholeQuantizer, load_result
from qft.documents.calibration import Attempt, Check
from qft.documents.evaluation import Score
from qft.errors import GateError
from qft.files import atomic_folder
from qft.measure.likelihood import Likelihood
from qft.measure.scores import answer_rows, score
from qft.measure.statistics import interval
from qft.memory.guard import memory_guard, smaller_calibration
from qft.model.by_block import generation_config
from qft.plan import CalibrationPlan
from qft.progress import View


def quantizer_for(plan: CalibrationPlan, source: Source, view: View) -> Quantizer:
    """What quantizes the model as planned, in the folder source.work."""
    set_seed(plan.seed)
    view.note(f"Reading {plan.model.checkpoint.path}")
    if plan.engine.whole_model:
        return WholeQuantizer(plan, source, view)
    data = plan.data
    asked = list(data.verify), data.prepared.place
    task = QuantizeTask(plan.calibrate, plan.schemes, *asked, data.windows, plan.seed, plan.settled, source.load)
    return BlockQuantizer(source.stream(), task, source.work, view)


def quantize_folder(plan: CalibrationPlan, folder: Path, work: Path, view: View) -> dict[str, Any]:
    """Quantize the planned model into `folder`, and say how that went; `work` is for what is made on the way. Raises
    GateError if calibrate.accept is not met, and leaves `folder` as it was then."""
    source = Source(plan.model, work)
    with memory_guard("calibrating", smaller_calibration(plan.calibrate)):
        acceptance = Acceptance(plan, source, quantizer_for(plan, source, view), view)
        if not acceptance.write(folder):
            raise GateError(acceptance.refusal(folder))
    last = acceptance.attempts[-1]
    return {
        "engine": plan.calibrate.engine,
        "scheme": plan.scheme_facts(),
        "kl": last.kl_mean,
        "top1_agreement": last.top1_agreement,
        "perplexity_change": last.perplexity_change.value,
        "layers_in_more_bits": last.kept,
    }


@dataclass
class Acceptance:
    """Trials of one quantizer, until one is accepted."""

    plan: CalibrationPlan
    source: Source
    quantizer: Quantizer
    view: View
    attempts: list[Attempt] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    """Of the last attempt."""
    scores_before: dict[str, float] = field(default_factory=dict)
    """Task scores of the unquantized model, by the names in eval.metrics, if calibrate.accept asks for them."""

    def write(self, folder: Path, add: Callable[[Path], None] = lambda _: None) -> bool:
        """Make `folder`, atomically, of the first trial that is accepted, with what `add` puts there; whether there is
        one."""
        for trial in self.quantizer.trials():
            self.before: Likelihood = trial.verification.before
            self.attempts.append(self._measured(trial))
            self.checks = self._checks()
            accepted = all(check.passed for check in self.checks) and self._written(trial, folder, add)
            self.view.note(_in_words(self.attempts[-1], self.checks))
            if accepted:
                return True
        return False

    def refusal(self, folder: Path) -> str:
        """What was missed, and what could be done."""
        missed = [f"{c.name} is {c.value:.4g}, above {c.limit:.4g}" for c in self.checks if not c.passed]
        tried = f" after {len(self.attempts)} attempts" if len(self.attempts) > 1 else ""
        return f"{folder}: not accepted{tried}: {'; '.join(missed)}. {self._advice()}"

    def _advice(self) -> str:
        if self.plan.engine.whole_model:
            section = "quant" if self.plan.engine.by_plugin else "calibrate"
            return f"Hold more bits, leave layers out ({section}.skip_modules), or accept more"
        return (
            "Hold more bits (calibrate.bits, a smaller group_size, skip_modules), let calibrate.remedy: auto "
            "choose the layers or calibrate.remedy: distill train what they hold, or accept more"
        )

    def _measured(self, trial: Trial) -> Attempt:
        seed, after, rows = self.plan.seed, trial.verification.after, len(self.plan.data.verify)
        change = after.perplexity_change(trial.verification.before, seed=seed)
        assert after.divergence is not None
        kl, agrees = after.divergence.kl, after.divergence.agrees
        planned = self.plan.schemes
        raised = {name: s.bits if s else 16 for name, s in trial.schemes.items() if s != planned[name]}
        return Attempt(
            kept=raised,
            distilled_steps=self.plan.calibrate.distill_steps if trial.distilled else 0,
            weight_bytes=trial.weight_bytes,
            perplexity=perplexity(after, seed),
            perplexity_change=Score.of(change),
            kl_mean=float(kl.mean()),
            kl_interval=Score.of(interval(after.mean_kl, rows, seed=seed)),
            kl_p99=float(np.percentile(kl, 99)),
            top1_agreement=float(agrees.mean()),
        )

    def _checks(self) -> list[Check]:
        """Of what needs no generation."""
        attempt, accept = self.attempts[-1], self.plan.calibrate.accept
        values = {"perplexity_increase": attempt.perplexity_change.value, "kl": attempt.kl_mean}
        limits = {name: getattr(accept, name) for name in values}
        return [_check(name, values[name], limit) for name, limit in limits.items() if limit is not None]

    def _written(self, trial: Trial, final: Path, add: Callable[[Path], None]) -> bool:
        """Write the model as engines load it, unless its scores forbid it."""
        try:
            with atomic_folder(final) as folder:
                self.quantizer.assemble(folder, trial)
                generation_config(self.plan.model).save_pretrained(folder)
                self.plan.model.checkpoint.save_reader(self.plan.model.tokenizer, folder)
                add(folder)
                if (limit := self.plan.calibrate.accept.score_drop) is not None:
                    self._check_scores(folder, limit)
        except _MissedError:
            return False
        return True

    def _check_scores(self, folder: Path, limit: float) -> None:
        scores = self._scores(load_result(self.plan, folder))
        self.attempts[-1] = self.attempts[-1].model_copy(update={"scores": scores})
        self.scores_before = self.scores_before or self._scores(self.source.load())
        drop = max(self.scores_before[name] - scores[name] for name in scores)
        self.checks.append(_check("score_drop", drop, limit))
        if not self.checks[-1].passed:
            raise _MissedError

    def _scores(self, model: Any) -> dict[str, float]:
        settings = self.plan.recipe.eval
        answers = answer_rows(model.eval(), self.plan.model.tokenizer, self.plan.data.verify, settings)
        return {name: score(name, answers, pattern=settings.regex).value for name in settings.metrics}


class _MissedError(Exception):
    """A written model is not accepted."""


def perplexity(likelihood: Likelihood, seed: int) -> Score:
    """With its interval over rows."""
    return Score.of(interval(likelihood.perplexity, len(likelihood.tokens), seed=seed))


def _check(name: str, value: float, limit: float) -> Check:
    return Check(name=name, value=value, limit=limit, passed=value <= limit)


def _in_words(attempt: Attempt, checks: list[Check]) -> str:
    kept = f", {len(attempt.kept)} layers in more bits" if attempt.kept else ""
    kept += f", distilled for {attempt.distilled_steps} steps" if attempt.distilled_steps else ""
    verdict = ": accepted" if all(check.passed for check in checks) else ": not accepted"
    return (
        f"{attempt.weight_bytes / 2**20:,.1f} MiB{kept}: perplexity {attempt.perplexity.value:.3f} "
        f"({attempt.perplexity_change.value:+.2%}), KL {attempt.kl_mean:.4f}{verdict if checks else ''}"
    )
