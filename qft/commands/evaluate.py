"""`qft eval`: several models on the same rows and the same tokens, compared."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from qft.calibration.layer_errors import layer_errors
from qft.commands.advising import Advised
from qft.commands.asked import EvalOptions, with_metrics
from qft.commands.by_url import evaluate_server
from qft.commands.by_vllm import evaluate_vllm
from qft.commands.measured import Measured, result
from qft.commands.results import require_replaceable, write_results
from qft.data.batch import pad_token_id, pictured_inputs
from qft.data.sources import some_places
from qft.disk import require_free_space
from qft.documents.evaluation import Advice, EvalDocument, LayerError
from qft.errors import NonFiniteError, RecipeError
from qft.machine.device import versions
from qft.measure.evalset import EvalSet, eval_set
from qft.measure.harness import asked_tasks, check_tasks, load_tasks, require_answer_room, run_tasks
from qft.measure.likelihood import Likelihood, LogProbs, measure
from qft.measure.scores import answer_rows
from qft.measure.speed import decode_speed, prefill_speed
from qft.memory.guard import memory_guard
from qft.memory.meter import Meter, weight_bytes
from qft.model.target import VLLM, Target, load_target, parse_target, require_one_tokenizer, split_variant
from qft.plan import ModelPlan
from qft.progress import View
from qft.recipe import Recipe
from qft.run.lock import locked

__all__ = ["EvalOptions", "evaluate"]

LAYER_TOKENS = 2048
"""Tokens on whose activations layers are compared."""

SPEED_PROMPT = 256
"""Tokens of the prompt that speed is measured on, or fewer if the rows hold fewer."""

SPEED_ANSWER = 32
"""Tokens that are written behind it, or half of what a table of positions has room for."""


def evaluate(names: Sequence[str], options: EvalOptions, view: View) -> EvalDocument:
    """Measure each target of `names` and compare them with the reference.

    Raises QftError: whatever is wrong with a target, the data or a metric is told before any model is loaded."""
    if options.engine.url is not None:
        return evaluate_server(names, options, view)
    if len(names) == 1 and split_variant(names[0])[1] == VLLM:
        return evaluate_vllm(names[0], options, view)
    advised = Advised.of(names, options.reference) if options.advise else None
    if advised and advised.compared:
        options = replace(options, reference=advised.reference, layers=True)
    targets = _targets(names, options)
    targets += advised.others.values() if advised else ()
    if options.out is None:
        return _evaluated(targets, options, view, advised)
    with locked(options.out, "qft eval"):
        asked = [*(target.name for target in targets), *([advised.kept_name] if advised else [])]
        require_replaceable(options.out, asked, options.data)
        return _evaluated(targets, options, view, advised)


def _evaluated(targets: list[Target], options: EvalOptions, view: View, advised: Advised | None) -> EvalDocument:
    started = time.perf_counter()
    first = next((target for target in targets if target.has_recipe), targets[0])
    recipe = with_metrics(first.loaded.recipe, options.metrics)
    asked = asked_tasks(first.loaded, options.harness)
    check_tasks(asked)
    view.note("Reading the configurations and the rows")
    for target in targets:
        if target.unverified:
            view.note(target.unverified)
    plans = [target.plan() for target in targets]
    require_one_tokenizer(targets, plans)
    evalset = eval_set(
        recipe.having(data=plans[0].rows_for(recipe.data)),
        plans[0].tokenizer,
        data=options.data,
        kept=first.rows,
        window=options.window,
        stride=options.stride,
        holds_rows_out=first.has_recipe,
        pictures=plans[0].pictures,
    )
    tasks = load_tasks(asked, seed=recipe.seed)
    for plan in [plan for target, plan in zip(targets, plans, strict=True) if not target.in_llamacpp]:
        evalset.require_room(plan, recipe.eval)
        require_answer_room(tasks, plan.shape.position_table)
    set_seed(recipe.seed)
    work = _Evaluation(recipe, evalset, tasks, options, view, _log_probs(plans[0], evalset, options))
    measured = work.measure(targets, plans)
    if advised and (kept := advised.with_layers_kept(_layers_of(measured, advised), measured[0].model)):
        measured += work.measure([kept], [kept.plan()], measured[0])
    document = EvalDocument(
        data=evalset.sources,
        rows=len(evalset.passages),
        window=options.window if evalset.windowed else None,
        stride=options.stride if evalset.windowed else None,
        reference=options.reference,
        device=plans[0].device.name,
        seed=recipe.seed,
        versions=versions() | ({"lm_eval": version("lm_eval")} if tasks else {}),
        targets=[result(each, measured[0], recipe, evalset, options.reference) for each in measured],
        advice=work.advice(advised, measured, plans[-1]) if advised else [],
        wall_seconds=time.perf_counter() - started,
    )
    if options.out:
        write_results(options.out, document, {one.name: one.answers for one in measured if one.answers}, evalset.place)
    return document


def _log_probs(plan: ModelPlan, evalset: EvalSet, options: EvalOptions) -> LogProbs | None:
    if options.reference is None:
        return None
    vocabulary = plan.checkpoint.config.get_text_config().vocab_size
    tokens = min(options.kl_tokens, sum(passage.scored for passage in evalset.passages))
    folder = Path(tempfile.gettempdir())
    require_free_space(folder, tokens * vocabulary * 4, "the reference's distributions (--kl-tokens)")
    return LogProbs(folder, tokens, vocabulary)


def _layers_of(measured: Sequence[Measured], advised: Advised) -> list[LayerError]:
    """Of the run without its adapter."""
    return next((each.figures.get("layers", []) for each in measured if each.name == advised.bare_name), [])


def _smaller(plan: ModelPlan, recipe: Recipe, options: EvalOptions) -> Iterator[str]:
    """What lets the evaluation of a target take less."""
    if plan.scheme.above_4_bits:
        yield "hold the base in 4 bits (TARGET@nf4)"
    for name, rows in [("--batch-size", options.batch_size), ("eval.batch_size", recipe.eval.batch_size)]:
        if rows > 1:
            yield f"lower {name} ({rows})"


def _targets(names: Sequence[str], options: EvalOptions) -> list[Target]:
    """The targets, the reference first. Raises RecipeError for what cannot be compared."""
    wanted = list(dict.fromkeys(names))
    if options.reference is not None and options.reference not in wanted:
        wanted.append(options.reference)
    wanted.sort(key=lambda name: name != options.reference)
    found = [parse_target(name, adapter=options.adapter, data=options.data) for name in wanted]
    if options.data is None and not any(target.has_recipe for target in found):
        raise RecipeError(
            f"{found[0].name}: a model has no rows of its own; give --data FILE, or compare it with a run"
        )
    if options.layers and options.reference is None:
        raise RecipeError("--layers compares with a reference: give --reference TARGET, an unquantized one")
    if options.layers and (outside := [target.name for target in found if target.in_llamacpp]):
        raise RecipeError(f"--layers: looks into models that transformers runs, and {outside[0]} is run by llama.cpp")
    return found


@dataclass(frozen=True)
class _Evaluation:
    """What every target is asked."""

    recipe: Recipe
    evalset: EvalSet
    tasks: Mapping[str, Any]
    options: EvalOptions
    view: View
    store: LogProbs | None
    """Room on disk for the reference's distributions; None without a reference."""

    def measure(
        self, targets: Sequence[Target], plans: Sequence[ModelPlan], reference: Measured | None = None
    ) -> list[Measured]:
        """Ask one after another; without the `reference` that was measured before, the first may be it."""
        measured: list[Measured] = []
        for target, plan in zip(targets, plans, strict=True):
            self.view.note(f"Evaluating {target.name}")
            if plan.held_in_part:
                self.view.note(f"  {plan.held_in_part}")
            with memory_guard(f"evaluating {target.name}", _smaller(plan, self.recipe, self.options)):
                measured.append(self._ask(target, plan, reference or (measured[0] if measured else None)))
        return measured

    def advice(self, advised: Advised, measured: Sequence[Measured], plan: ModelPlan) -> list[Advice]:
        """On the run, from all that was measured."""
        found = {each.name: (each.likelihood, each.figures["weight_bytes"]) for each in measured if each.likelihood}
        return advised.advice(self.recipe, found, measured[0].model, self._batches(plan))

    def _ask(self, target: Target, plan: ModelPlan, first: Measured | None) -> Measured:
        found = self._read(target, plan, {"against" if first else "write": self.store} if self.store else {})
        if self.tasks:
            self.view.note(f"  asking lm-evaluation-harness: {', '.join(Path(task).name for task in self.tasks)}")
            asked = found.model, plan.tokenizer, self.tasks, self.recipe.eval
            length = plan.shape.max_positions
            found.figures["harness"] = run_tasks(*asked, seed=self.recipe.seed, max_length=length)
        if self.options.layers and first:
            self.view.note("  comparing its layers with the reference's")
            found.figures["layers"] = layer_errors(first.model, found.model, self._batches(plan))
        if first or not self.options.layers:
            found.model = None  # only layers need two models at once
        if likelihood := found.likelihood:
            self.view.note(f"  perplexity {likelihood.perplexity():.3f} over {likelihood.tokens.sum():,} tokens")
        return found

    def _read(self, target: Target, plan: ModelPlan, store: dict[str, LogProbs]) -> Measured:
        passages, answered = self.evalset.passages, self.evalset.answered
        with Meter(plan.device.kind) as meter:
            before = meter.settled()
            model = load_target(target, plan)
            meter.settled()
            meter.restart()
            pad = pad_token_id(plan.tokenizer)
            batch, pictures = self.options.batch_size, plan.pictures
            likelihood = measure(model, passages, batch_size=batch, pad=pad, pictures=pictures, **store)
            self._require_finite(target, likelihood)
            settings = self.recipe.eval
            asked = answered.rows if answered and settings.metrics else None
            answers = answer_rows(model, plan.tokenizer, asked, settings, pictures) if asked else []
            prompt = max((passage.input_ids for passage in passages), key=len)[:SPEED_PROMPT]
            room = plan.shape.position_table or SPEED_PROMPT + SPEED_ANSWER
            written = min(SPEED_ANSWER, room // 2)
            figures = {
                "prefill_tokens_per_second": prefill_speed(model, prompt),
                "decode_tokens_per_second": decode_speed(model, prompt[: room - written], tokens=written),
                "weight_bytes": sum(weight_bytes(model).values()),
                "disk_bytes": _disk_bytes(target, plan),
                "peak_bytes": meter.peak().beyond(before),
            }
        return Measured(target.name, likelihood, answers, model, figures)

    def _require_finite(self, target: Target, likelihood: Likelihood) -> None:
        bad = [self.evalset.place_of(int(number)) for number in np.flatnonzero(~np.isfinite(likelihood.nll))]
        if bad:
            raise NonFiniteError(
                f"{target.name}: the loss of {some_places(bad)} is not finite. Look at what is asked, "
                "or hold the model in another dtype (TARGET@float32)"
            )
        if likelihood.divergence is not None and not np.isfinite(likelihood.divergence.kl).all():
            raise NonFiniteError(f"{target.name}: its divergence from {self.options.reference} is not finite")

    def _batches(self, plan: ModelPlan) -> list[dict[str, torch.Tensor]]:
        """Some of the passages, on the device: enough tokens to tell layers apart."""
        batches, tokens = [], 0
        for passage in self.evalset.passages:
            if tokens >= LAYER_TOKENS:
                break
            batches.append(pictured_inputs([vars(passage)], 0, plan.pictures, device=plan.device.kind))
            tokens += len(passage.input_ids)
        return batches


def _disk_bytes(target: Target, plan: ModelPlan) -> int:
    adapter = target.adapter.glob("*.safetensors") if target.adapter else []
    return sum(path.stat().st_size for path in [*plan.checkpoint.weight_files(), *adapter])
