"""`qft eval`: several models on the same rows and the same tokens, compared."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import set_seed

from qft.calibration.layer_errors import layer_errors
from qft.data.batch import pad_token_id
from qft.documents.evaluation import EvalDocument, HarnessResult, Score, SourceResult, TargetResult
from qft.errors import ModelError, RecipeError
from qft.files import require_free_space, write_json, write_text
from qft.machine.device import versions
from qft.measure.evalset import EvalSet, eval_set
from qft.measure.harness import asked_tasks, check_tasks, load_tasks, run_tasks
from qft.measure.likelihood import Likelihood, LogProbs, measure
from qft.measure.scores import SCORES, Answer, answer_rows, as_jsonl, score, score_change
from qft.measure.speed import decode_speed, prefill_speed
from qft.measure.statistics import interval
from qft.memory.guard import memory_guard
from qft.memory.meter import Meter, weight_bytes
from qft.model.target import Target, load_target, parse_target
from qft.plan import ModelPlan
from qft.plan.packages import missing_packages
from qft.progress import View
from qft.recipe import Recipe
from qft.run.folder import Run
from qft.views.html.page import TargetAnswer, evaluation_page

__all__ = ["EvalOptions", "default_out", "evaluate"]

LAYER_TOKENS = 2048
"""Tokens on whose activations layers are compared."""

SPEED_PROMPT = 256
"""Tokens of the prompt that speed is measured on, or fewer if the rows hold fewer."""


@dataclass(frozen=True)
class EvalOptions:
    """What the command line says beside the targets."""

    adapter: Path | None = None
    data: str | None = None
    window: int = 512
    """Tokens of a window over plain text."""
    stride: int = 256
    """Tokens from one window to the next."""
    reference: str | None = None
    metrics: tuple[str, ...] = ()
    """Scores, beside those of the recipe."""
    harness: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, beside those of the recipe."""
    batch_size: int = 8
    kl_tokens: int = 8192
    """Tokens over which distributions are compared; each takes 4 bytes times the vocabulary on disk."""
    layers: bool = False
    """Measure what quantizing did to each linear layer, against the reference."""
    out: Path | None = None


@dataclass
class _Measured:
    """One target, as measured; what the comparison still needs is kept."""

    name: str
    likelihood: Likelihood
    answers: list[Answer]
    model: Any
    """The loaded model; kept of the reference alone, and while layers are compared."""
    figures: dict[str, Any] = field(default_factory=dict)


def evaluate(names: Sequence[str], options: EvalOptions, view: View) -> EvalDocument:
    """Measure each target of `names` and compare them with the reference.

    Raises QftError: whatever is wrong with a target, the data or a metric is told before any model is loaded.
    """
    started = time.perf_counter()
    targets = _targets(names, options)
    if options.layers and options.reference is None:
        raise RecipeError("--layers compares with a reference: give --reference TARGET, an unquantized one")
    if options.layers and (outside := [target.name for target in targets if target.in_llamacpp]):
        raise RecipeError(f"--layers: looks into models that transformers runs, and {outside[0]} is run by llama.cpp")
    first = next((target for target in targets if target.has_recipe), targets[0])
    recipe = first.loaded.recipe
    metrics = tuple(dict.fromkeys((*recipe.eval.metrics, *options.metrics)))
    _require_metrics(metrics, recipe)
    asked = asked_tasks(first.loaded, options.harness)
    check_tasks(asked)
    view.note("Reading the configurations and the rows")
    plans = [target.plan() for target in targets]
    _require_one_tokenizer(targets, plans)
    evalset = eval_set(
        recipe.having(data=plans[0].rows_for(recipe.data)),
        plans[0].tokenizer,
        data=options.data,
        kept=first.rows,
        window=options.window,
        stride=options.stride,
        with_answers=bool(metrics),
        holds_rows_out=first.has_recipe,
    )
    tasks = load_tasks(asked, seed=recipe.seed)
    set_seed(recipe.seed)
    measured: list[_Measured] = []
    reference: _Measured | None = None
    with _log_probs(evalset, plans[0], options) as store:
        for target, plan in zip(targets, plans, strict=True):
            view.note(f"Evaluating {target.name}")
            role = "write" if target.name == options.reference else "against"
            with memory_guard(f"evaluating {target.name}", _smaller(plan, recipe, options)):
                found = _measure(target, plan, evalset, recipe, metrics, options, {role: store} if store else {})
                if tasks:
                    view.note(f"  asking lm-evaluation-harness: {', '.join(Path(task).name for task in tasks)}")
                    found.figures["harness"] = _harness(found.model, plan, tasks, recipe)
                if options.layers and reference:
                    view.note("  comparing its layers with the reference's")
                    found.figures["layers"] = layer_errors(reference.model, found.model, _batches(evalset, plan))
            if target.name == options.reference:
                reference = found
            if found is not reference or not options.layers:
                found.model = None  # only layers need two models at once
            measured.append(found)
            view.note(f"  perplexity {found.likelihood.perplexity():.3f} over {found.likelihood.tokens.sum():,} tokens")
    document = EvalDocument(
        data=evalset.sources,
        rows=len(evalset.passages),
        window=options.window if evalset.windowed else None,
        stride=options.stride if evalset.windowed else None,
        reference=options.reference,
        device=plans[0].device.name,
        seed=recipe.seed,
        versions=versions() | ({"lm_eval": version("lm_eval")} if tasks else {}),
        targets=[_result(m, reference, evalset, recipe, metrics) for m in measured],
        wall_seconds=time.perf_counter() - started,
    )
    if options.out:
        _write(options.out, document, measured, evalset)
    return document


def _smaller(plan: ModelPlan, recipe: Recipe, options: EvalOptions) -> Iterator[str]:
    """What lets the evaluation of a target take less."""
    if plan.scheme.name in ("none", "8bit"):
        yield "hold the base in 4 bits (TARGET@nf4)"
    for name, rows in [("--batch-size", options.batch_size), ("eval.batch_size", recipe.eval.batch_size)]:
        if rows > 1:
            yield f"lower {name} ({rows})"


def _require_metrics(metrics: Sequence[str], recipe: Recipe) -> None:
    problems = [f"--metric {name}: is none of {', '.join(SCORES)}" for name in metrics if name not in SCORES]
    if "regex" in metrics and recipe.eval.regex is None:
        problems.append("--metric regex: looks for eval.regex, which only a recipe has")
    problems += [f"{name}: {text}" for name, text in missing_packages(metrics)]
    if problems:
        raise RecipeError(problems)


def _targets(names: Sequence[str], options: EvalOptions) -> list[Target]:
    """The targets, the reference first."""
    wanted = list(dict.fromkeys(names))
    if options.reference is not None and options.reference not in wanted:
        wanted.append(options.reference)
    wanted.sort(key=lambda name: name != options.reference)
    found = [parse_target(name, adapter=options.adapter, data=options.data) for name in wanted]
    if options.data is None and not any(target.has_recipe for target in found):
        raise RecipeError(
            f"{found[0].name}: a model has no rows of its own; give --data FILE, or compare it with a run"
        )
    return found


def _require_one_tokenizer(targets: list[Target], plans: list[ModelPlan]) -> None:
    first = plans[0]
    for target, plan in zip(targets[1:], plans[1:], strict=True):
        if _tokens(plan) != _tokens(first) or plan.tokenizer.chat_template != first.tokenizer.chat_template:
            raise ModelError(
                f"{target.name}: its tokenizer or chat template differs from that of {targets[0].name}, so their "
                "tokens cannot be compared; evaluate them apart (bits per byte compare across tokenizers)"
            )


def _tokens(plan: ModelPlan) -> dict[str, int]:
    """The vocabulary, as far as there are embeddings; without what a GGUF file calls those that stand for no token."""
    embedded = plan.checkpoint.config.get_text_config().vocab_size
    return {token: i for token, i in plan.tokenizer.get_vocab().items() if i < embedded and token != f"[PAD{i}]"}


@contextmanager
def _log_probs(evalset: EvalSet, plan: ModelPlan, options: EvalOptions) -> Iterator[LogProbs | None]:
    """Room on disk for the reference's distributions; None without a reference."""
    if options.reference is None:
        yield None
        return
    vocabulary = plan.checkpoint.config.get_text_config().vocab_size
    tokens = min(options.kl_tokens, sum(passage.scored for passage in evalset.passages))
    with tempfile.TemporaryDirectory(prefix="qft-eval-") as folder:
        require_free_space(Path(folder), tokens * vocabulary * 4, "the reference's distributions (--kl-tokens)")
        yield LogProbs(Path(folder) / "log_probs.f32", tokens, vocabulary)


def _measure(
    target: Target,
    plan: ModelPlan,
    evalset: EvalSet,
    recipe: Recipe,
    metrics: Sequence[str],
    options: EvalOptions,
    store: dict[str, LogProbs],
) -> _Measured:
    with Meter(plan.device.kind) as meter:
        before = meter.settled()
        model = load_target(target, plan)
        meter.settled()
        meter.restart()
        pad = pad_token_id(plan.tokenizer)
        likelihood = measure(model, evalset.passages, batch_size=options.batch_size, pad=pad, **store)
        answers = _answers(model, plan, evalset.answered.rows, recipe) if metrics and evalset.answered else []
        prompt = max((passage.input_ids for passage in evalset.passages), key=len)[:SPEED_PROMPT]
        figures = {
            "prefill_tokens_per_second": prefill_speed(model, prompt),
            "decode_tokens_per_second": decode_speed(model, prompt),
            "weight_bytes": sum(weight_bytes(model).values()),
            "disk_bytes": _disk_bytes(target, plan),
        }
        figures["peak_bytes"] = meter.peak().beyond(before)
    return _Measured(target.name, likelihood, answers, model, figures)


def _batches(evalset: EvalSet, plan: ModelPlan) -> list[dict[str, torch.Tensor]]:
    """Some of the passages, on the device: enough tokens to tell layers apart."""
    batches, tokens = [], 0
    for passage in evalset.passages:
        if tokens >= LAYER_TOKENS:
            break
        ids = torch.tensor([list(passage.input_ids)], device=plan.device.kind)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        tokens += ids.numel()
    return batches


def _answers(model: Any, plan: ModelPlan, rows: Dataset, recipe: Recipe) -> list[Answer]:
    settings = recipe.eval
    return answer_rows(
        model,
        plan.tokenizer,
        rows,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        samples=settings.samples,
    )


def _harness(model: Any, plan: ModelPlan, tasks: Mapping[str, Any], recipe: Recipe) -> list[HarnessResult]:
    return run_tasks(
        model,
        plan.tokenizer,
        tasks,
        seed=recipe.seed,
        batch_size=recipe.eval.batch_size,
        max_length=plan.shape.max_positions,
        limit=recipe.eval.harness_limit,
    )


def _disk_bytes(target: Target, plan: ModelPlan) -> int:
    adapter = target.adapter.glob("*.safetensors") if target.adapter else []
    return sum(path.stat().st_size for path in [*plan.checkpoint.weight_files(), *adapter])


def _result(
    measured: _Measured, reference: _Measured | None, evalset: EvalSet, recipe: Recipe, metrics: Sequence[str]
) -> TargetResult:
    likelihood, seed = measured.likelihood, recipe.seed
    rows = len(evalset.passages)
    result: dict[str, Any] = {
        "name": measured.name,
        "perplexity": likelihood.perplexity(),
        "perplexity_interval": Score.of(interval(likelihood.perplexity, rows, seed=seed)),
        "bits_per_byte": float(likelihood.nll.sum() / np.log(2) / evalset.text_bytes),
        "eval_tokens": int(likelihood.tokens.sum()),
        "scores": {n: Score.of(score(n, measured.answers, pattern=recipe.eval.regex, seed=seed)) for n in metrics},
        "by_source": _by_source(likelihood, evalset),
        **measured.figures,
    }
    if likelihood.divergence is not None:
        kl, agrees = likelihood.divergence.kl, likelihood.divergence.agrees
        result |= {"kl_mean": kl.mean(), "kl_p99": np.percentile(kl, 99), "top1_agreement": agrees.mean()}
        result["kl_tokens"] = len(kl)
    if reference is measured:
        result |= {"kl_mean": 0.0, "kl_p99": 0.0, "top1_agreement": 1.0}
    elif reference is not None:
        result["perplexity_change"] = Score.of(likelihood.perplexity_change(reference.likelihood, seed=seed))
        result["score_changes"] = {
            n: Score.of(score_change(n, measured.answers, reference.answers, pattern=recipe.eval.regex, seed=seed))
            for n in metrics
        }
    return TargetResult(**result)


def _by_source(likelihood: Likelihood, evalset: EvalSet) -> list[SourceResult]:
    numbers = np.array([passage.source for passage in evalset.passages])
    found = []
    for number in np.unique(numbers):
        rows = np.flatnonzero(numbers == number)
        found.append(
            SourceResult(
                source=evalset.sources[int(number)],
                perplexity=likelihood.perplexity(rows),
                eval_tokens=int(likelihood.tokens[rows].sum()),
            )
        )
    return found


def _write(out: Path, document: EvalDocument, measured: Sequence[_Measured], evalset: EvalSet) -> None:
    """eval.json, report.html, and each target's answers as JSONL."""
    shown: dict[str, list[TargetAnswer]] = {}
    for one in measured:
        if one.answers:
            name = "".join(c if c.isalnum() or c in "-._@" else "_" for c in one.name)
            write_text(out / "answers" / f"{name}.jsonl", as_jsonl(one.answers, evalset.place))
            shown[one.name] = [_shown(answer, evalset) for answer in one.answers]
    write_text(out / "report.html", evaluation_page(document, shown))
    write_json(out / "eval.json", document.model_dump(mode="json"))


def _shown(answer: Answer, evalset: EvalSet) -> TargetAnswer:
    place = evalset.place(answer.source, answer.row)
    return TargetAnswer(place, answer.prompt, answer.expected, answer.given, answer.right)


def default_out(names: Sequence[str]) -> Path | None:
    """Where results go unless the user says: into the first run among the targets."""
    runs = [Path(name.rpartition("@")[0] or name) for name in names]
    return next((run / "eval" for run in runs if Run(run).manifest()), None)
