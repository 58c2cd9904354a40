"""What a run's figures suggest to try next: one rule a remedy, each silent without its figure.

A change is paired by rows, and told only where its 95% interval lies on one side of zero.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from qft.documents.evaluation import Advice
from qft.documents.training import Report
from qft.measure.likelihood import Likelihood
from qft.measure.statistics import Interval
from qft.recipe import Recipe

LARGEST_FLOAT16 = 65504.0
SPIKES, CLIPPED, WEAK_HALF = 0.05, 0.25, 0.15
"""Shares from which on something is told: of steps that spiked, of steps that were clipped, and of an adapter's update
that lies in the weaker half of its directions."""
ROUNDED_BY_FORM = {"compressed-tensors": "int4-g32", "bnb-4bit": "nf4", "gguf-q4_0": "q4_0", "gguf-q8_0": "q8_0"}
"""Formats that are trained for, by the export that writes them."""


def deployed_as(recipe: Recipe) -> str:
    """The format of quant.target that the recipe's own export or calibration comes to; else int4-g32."""
    if recipe.calibrate and (recipe.calibrate.bits, recipe.calibrate.data_type) == (4, "int"):
        return f"int4-g{size}" if (size := recipe.calibrate.group_size) in (32, 64, 128) else "int4-g32"
    return next((ROUNDED_BY_FORM[form] for form in recipe.export.target if form in ROUNDED_BY_FORM), "int4-g32")


@dataclass(frozen=True)
class Facts:
    """What was measured of a run."""

    recipe: Recipe
    report: Report
    own: Likelihood
    """Of the run as it was trained."""
    base: Likelihood | None = None
    """Of its unquantized base."""
    others: Mapping[str, Likelihood] = field(default_factory=dict)
    """Held otherwise, by the names of `_other_ways`; `kept`: with layers in 16 bits."""
    kept: Sequence[str] = ()
    """Names in the quant.skip_modules of `kept`."""
    more_bytes: Mapping[str, int] = field(default_factory=dict)
    """Of the weights of others beyond those of `bare`."""
    weak_half: float | None = None
    """Share of the adapter's update in the weaker half of its directions; None without an adapter."""
    largest: tuple[str, float] | None = None
    """The module of the unquantized model whose output has the largest magnitude on the held-out rows, and that."""
    dtype: str = ""
    """In which the run is held."""

    def change(self, before: Likelihood, after: Likelihood) -> Interval:
        """Relative, of the perplexity."""
        return after.perplexity_change(before, seed=self.recipe.seed)


def advise(facts: Facts) -> list[Advice]:
    """What to try next, what is surest first."""
    return [advice for rule in RULES for advice in rule(facts)]


def _nf4(facts: Facts) -> Iterator[Advice]:
    yield from _held_otherwise(facts, "nf4", "fp4 costs more than nf4", {"quant.quant_type": "nf4"})


def _single(facts: Facts) -> Iterator[Advice]:
    yield from _held_otherwise(
        facts, "single", "Quantizing the scales too (double_quant) costs accuracy", {"quant.double_quant": False}
    )


def _kept(facts: Facts) -> Iterator[Advice]:
    finding = f"{len(facts.kept)} layers lose most"
    yield from _held_otherwise(facts, "kept", finding, {"quant.skip_modules": list(facts.kept)})


def _held_otherwise(facts: Facts, way: str, finding: str, recipe: dict[str, Any]) -> Iterator[Advice]:
    """If the run's base is better so."""
    bare = facts.others.get("bare", facts.own)
    if way not in facts.others or (change := facts.change(bare, facts.others[way])).high >= 0:
        return
    more = facts.more_bytes.get(way, 0)
    yield Advice(
        name={"single": "double_quant", "kept": "skip_modules"}.get(way, way),
        finding=f"{finding}: of the base without the adapter the perplexity is {bare.perplexity():.4g}, "
        f"and {facts.others[way].perplexity():.4g} with the lines below",
        gain=f"{_percent(change)} perplexity of the base, for {more / 2**20:+,.1f} MiB of weights",
        figures={"perplexity_change": change.value, "low": change.low, "high": change.high, "bytes": more},
        recipe=recipe,
    )


def _rounding(facts: Facts) -> Iterator[Advice]:
    """Of a run that was trained without the rounding of its deployment: quantization-aware training, or distilling."""
    if "rounded" not in facts.others or (cost := facts.change(facts.own, facts.others["rounded"])).low <= 0:
        return
    form, run = deployed_as(facts.recipe), facts.report.run
    figures = {"perplexity_change": cost.value, "low": cost.low, "high": cost.high}
    finding = f"Rounding this run to {form} takes its perplexity from {facts.own.perplexity():.4g} to "
    finding += f"{facts.others['rounded'].perplexity():.4g} ({_percent(cost)})"
    most = 1 / (1 + cost.value) - 1
    gain = f"at most {most:+.1%} perplexity of the rounded model"
    quant = {"quant.preset": None, "quant.mode": "qat", "quant.target": form}
    dropout = {"adapter.lora_dropout": 0.0} if facts.recipe.adapter.lora_dropout else {}
    yield Advice(
        name="qat",
        finding=f"{finding}: train within that rounding, on the same rows",
        gain=gain,
        figures=figures,
        recipe=quant | dropout,
    )
    path = f"{run}/export/merged" if facts.recipe.adapter.kind == "lora" else f"{run}/model"
    yield Advice(
        name="distill",
        finding=f"{finding}: or learn the predictions of this run (`qft export --to merged`) within it",
        gain=gain,
        figures=figures,
        recipe={"model.path": path} | quant | {"quant.distill": True} | dropout,
    )


def _distill(facts: Facts) -> Iterator[Advice]:
    """Of a run that was trained within its rounding, and is worse than the base unrounded and untrained."""
    quant, lora = facts.recipe.quant, facts.recipe.adapter.kind == "lora"
    if quant.mode != "qat" or quant.distill or not lora or facts.base is None:
        return
    if (behind := facts.change(facts.base, facts.own)).low <= 0:
        return
    yield Advice(
        name="distill",
        finding=f"As trained the perplexity is {facts.own.perplexity():.4g}, and {facts.base.perplexity():.4g} of the "
        "base unrounded and untrained: these rows did not give back what rounding takes",
        gain=f"at most {1 / (1 + behind.value) - 1:+.1%} perplexity",
        figures={"perplexity_change": behind.value, "low": behind.low, "high": behind.high},
        recipe={"quant.distill": True},
    )


def _learning_rate(facts: Facts) -> Iterator[Advice]:
    report, rate = facts.report, facts.recipe.train.learning_rate
    after, lowest = report.eval.after, min(report.eval.history, key=lambda e: e.loss, default=None)
    slower = {"train.learning_rate": rate / 2}
    if after and lowest and after.loss > 1.01 * lowest.loss:
        yield Advice(
            name="learning_rate",
            finding=f"The held-out loss was {lowest.loss:.4g} at step {lowest.step} and {after.loss:.4g} at the end, "
            f"with a learning_rate of {rate:g}",
            gain=f"{after.loss - lowest.loss:.4g} nats of held-out loss",
            figures={"lowest": lowest.loss, "last": after.loss, "step": lowest.step},
            recipe=slower,
        )
    elif report.loss.spikes > SPIKES * report.steps:
        rises = _rises([loss for _, loss, *_ in report.loss.history], report.loss.spikes)
        yield Advice(
            name="learning_rate",
            finding=f"The loss spiked in {report.loss.spikes} of {report.steps} steps, with a learning_rate of "
            f"{rate:g}",
            gain=f"what these steps lost: {rises:.4g} nats of training loss in the middle one",
            figures={"spikes": report.loss.spikes, "steps": report.steps, "rise": rises},
            recipe=slower,
        )


def _rises(losses: Sequence[float], count: int) -> float:
    """The median of the `count` largest from step to step."""
    rises = sorted((after - before for before, after in pairwise(losses)), reverse=True)
    return statistics.median(rises[:count])


def _clipping(facts: Facts) -> Iterator[Advice]:
    most = facts.recipe.train.max_grad_norm
    norms = [norm for *_, norm in facts.report.loss.history]
    clipped = [norm for norm in norms if most and norm > most]
    if len(clipped) < CLIPPED * len(norms):
        return
    middle, share = statistics.median(clipped), len(clipped) / len(norms)
    yield Advice(
        name="clipping",
        finding=f"Gradients were clipped to a norm of {most:g} in {share:.0%} of the steps, half of them from "
        f"{middle:.3g} and more",
        gain=f"these steps count with {most / middle:.0%} of their gradient at the median, others with all of it",
        figures={"share": share, "median_norm": middle, "max_grad_norm": most},
        recipe={"train.max_grad_norm": float(f"{middle:.1g}")},
    )


def _rank(facts: Facts) -> Iterator[Advice]:
    before, after = facts.report.eval.before, facts.report.eval.after
    if facts.weak_half is None or facts.weak_half < WEAK_HALF or not (before and after and after.loss < before.loss):
        return
    if any(each.loss < after.loss / 1.01 for each in facts.report.eval.history):
        return  # it had learnt too much already
    r, won = facts.recipe.adapter.r, before.loss - after.loss
    yield Advice(
        name="rank",
        finding=f"The weaker half of the {r} directions of the adapter carries {facts.weak_half:.0%} of its update: "
        "there is no rank to spare",
        gain=f"by that share of the {won:.4g} nats that it learnt, some {facts.weak_half * won:.3g} nats",
        figures={"share": facts.weak_half, "r": r, "learnt": won},
        recipe={"adapter.r": 2 * r, "adapter.lora_alpha": 2 * facts.recipe.adapter.lora_alpha},
    )


def _float16(facts: Facts) -> Iterator[Advice]:
    """Of a run that computes in float16, or is to be exported so."""
    recipe, largest = facts.recipe, facts.largest
    lines: dict[str, Any] = {}
    if facts.dtype == "float16":
        lines["model.dtype"] = "bfloat16"
    if recipe.train.fp16:
        lines["train.fp16"] = False
    if "gguf-f16" in recipe.export.target:
        lines["export.target"] = ["gguf-bf16" if form == "gguf-f16" else form for form in recipe.export.target]
    if largest is None or largest[1] <= LARGEST_FLOAT16 or not lines:
        return
    yield Advice(
        name="float16",
        finding=f"{largest[0]} reaches {largest[1]:,.0f} on the held-out rows, and float16 ends at 65,504",
        gain="numbers that are finite",
        figures={"largest": largest[1]},
        recipe=lines,
    )


RULES: tuple[Callable[[Facts], Iterator[Advice]], ...] = (
    _float16, _nf4, _kept, _single, _rounding, _distill, _learning_rate, _clipping, _rank,
)  # fmt: skip


def _percent(change: Interval) -> str:
    return f"{change.value:+.1%} [{change.low:+.1%}, {change.high:+.1%}]"
