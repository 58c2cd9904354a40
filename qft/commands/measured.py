"""What was measured of one target of `qft eval`, and its figures beside the reference's."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from qft.documents.evaluation import Score, SourceResult, TargetResult
from qft.measure.evalset import EvalSet
from qft.measure.likelihood import Likelihood
from qft.measure.scores import Answer, score, score_change
from qft.measure.statistics import interval
from qft.recipe import Recipe

OF_THIS_PROCESS = (
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "weight_bytes",
    "disk_bytes",
    "peak_bytes",
)
"""Figures that an engine of its own does not tell."""


@dataclass
class Measured:
    """One target, as measured; what the comparison still needs is kept."""

    name: str
    likelihood: Likelihood | None
    """None: of a server that does not tell it."""
    answers: list[Answer]
    model: Any
    """The loaded model; kept of the reference alone, and while layers are compared."""
    figures: dict[str, Any]


def result(
    measured: Measured, first: Measured, recipe: Recipe, evalset: EvalSet | None, reference: str | None
) -> TargetResult:
    """The figures of one target, beside those of the `first` where that is the reference."""
    metrics, regex, seed = recipe.eval.metrics, recipe.eval.regex, recipe.seed
    made: dict[str, Any] = {
        "name": measured.name,
        "scores": {n: Score.of(score(n, measured.answers, pattern=regex, seed=seed)) for n in metrics},
        **dict.fromkeys(OF_THIS_PROCESS),
        **measured.figures,
        **_likely(measured.likelihood, evalset, seed),
    }
    if measured.name == reference:
        made |= {"kl_mean": 0.0, "kl_p99": 0.0, "top1_agreement": 1.0}
    elif reference is not None:
        if measured.likelihood and first.likelihood:
            made["perplexity_change"] = Score.of(measured.likelihood.perplexity_change(first.likelihood, seed=seed))
        made["score_changes"] = {
            n: Score.of(score_change(n, measured.answers, first.answers, pattern=regex, seed=seed)) for n in metrics
        }
    return TargetResult(**made)


def _likely(likelihood: Likelihood | None, evalset: EvalSet | None, seed: int) -> dict[str, Any]:
    if likelihood is None or evalset is None:
        return {"perplexity": None, "perplexity_interval": None, "bits_per_byte": None, "eval_tokens": 0}
    made: dict[str, Any] = {
        "perplexity": likelihood.perplexity(),
        "perplexity_interval": Score.of(interval(likelihood.perplexity, len(evalset.passages), seed=seed)),
        "bits_per_byte": float(likelihood.nll.sum() / np.log(2) / evalset.text_bytes),
        "eval_tokens": int(likelihood.tokens.sum()),
        "by_source": _by_source(likelihood, evalset),
    }
    if likelihood.divergence is not None:
        kl, agrees = likelihood.divergence.kl, likelihood.divergence.agrees
        made |= {"kl_mean": kl.mean(), "kl_p99": np.percentile(kl, 99), "top1_agreement": agrees.mean()}
        made["kl_tokens"] = len(kl)
    return made


def _by_source(likelihood: Likelihood, evalset: EvalSet) -> list[SourceResult]:
    numbers = np.array([passage.source for passage in evalset.passages])
    by_source = {int(number): np.flatnonzero(numbers == number) for number in np.unique(numbers)}
    return [
        SourceResult(
            source=evalset.sources[number],
            perplexity=likelihood.perplexity(rows),
            eval_tokens=int(likelihood.tokens[rows].sum()),
        )
        for number, rows in by_source.items()
    ]
