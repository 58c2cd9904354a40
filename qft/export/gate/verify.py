"""The gate: an artifact, loaded again from disk, compared with the model as it was trained.

The model as trained is asked first and let go; its log probabilities wait on disk. So one model is in memory at a time.
"""

import gc
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch import nn

from qft.calibration.layer_errors import decibels
from qft.data.batch import pad_token_id
from qft.data.encoded import read_rows
from qft.data.prepare import KEPT, held_out, prepare
from qft.disk import disk_failures, require_free_space
from qft.documents.export import Gate, GateCheck
from qft.errors import MissingError, ModelError
from qft.export.gate.routed import Choices
from qft.export.job import Job
from qft.export.targets import EXPORTERS, Exporter
from qft.export.targets.base import Facts, Limits, Read, facts_of
from qft.measure.likelihood import Likelihood, LogProbs, Passage, measure
from qft.measure.scores import answer_rows, generation_config
from qft.memory.guard import memory_guard
from qft.model.handover import FORMS
from qft.model.target import load_target
from qft.quant.dequantize import dequantized_weight
from qft.quant.hold import Qat
from qft.quant.rounding.integer import static_scale
from qft.recipe.schema import EvalSection

TOKENS = 4096
"""Learnt tokens over which distributions are compared, at most."""
CONTINUATIONS, NEW_TOKENS = 4, 16
"""Prompts that are continued greedily, and by how many tokens."""
SMALLER = ("export on a device with more memory", "export without proof (--no-gate)")
"""What to do where there is no room for the gate."""
BATCH = 8
SAME = 0.95
"""The least share of a mixture's experts that an artifact of the same weights chooses as the model as trained did."""
ROUNDING = 16
"""Steps of the dtype at 1 by which a log probability may differ where the same weights are multiplied, in nats."""


@dataclass(frozen=True)
class Reference:
    """The model as trained, as the gate remembers it."""

    rows: Dataset
    passages: list[Passage]
    likelihood: Likelihood
    log_probs: LogProbs
    answers: list[str]
    stops: list[int]
    """Ids that ended them."""
    texts: list[str]
    """The rows as text."""
    facts: Facts
    choices: Choices
    """Which experts tokens went to; nothing of a model without such."""


@contextmanager
def reference(job: Job, scratch: Path) -> Iterator[Reference]:
    """Ask the model as trained; its log probabilities lie in `scratch` meanwhile. Raises MissingError without the rows
    that the recipe names, RunError without room for 4 bytes a token and entry of the vocabulary."""
    rows = _rows(job)
    passages = [Passage.of(row) for row in rows]
    tokens = min(TOKENS, sum(passage.scored for passage in passages))
    with memory_guard("asking the model as trained", SMALLER):
        model = load_target(job.target, job.plan)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        require_free_space(scratch, tokens * vocabulary * 4, "the log probabilities that the gate compares with")
        store = LogProbs(scratch, tokens, vocabulary)
        pad = pad_token_id(job.plan.tokenizer)
        choices = Choices()
        with choices.noted(model):
            likelihood = measure(model, passages, batch_size=BATCH, pad=pad, write=store, pictures=job.plan.pictures)
        answers = _answers(model, job, rows)
        stops = generation_config(model, job.plan.tokenizer, NEW_TOKENS, passages[0].labels).eos_token_id
        texts = [job.plan.tokenizer.decode(row["input_ids"]) for row in rows]
        facts = facts_of(model, job.plan.tokenizer, texts)
        del model
        gc.collect()
        yield Reference(rows, passages, likelihood, store, answers, stops, texts, facts, choices)


def judge(job: Job, target: str, folder: Path, expected: Reference) -> Gate:
    """Load the artifact in `folder` by its engine and compare, by the limits of target and recipe; what cannot be
    loaded does not pass."""
    exporter = EXPORTERS[target]
    limits = limits_of(job, target)
    checks = list(_checks(job, exporter, folder, expected, limits))
    missed = any(check.name in vars(limits) and not check.passed for check in checks)
    read = exporter.reader(job, folder) if missed else None
    return Gate(
        passed=all(check.passed for check in checks),
        engine=exporter.engine,
        rows=len(expected.rows),
        tokens=expected.log_probs.tokens,
        worst_weight=_worst_weight(job, read) if read else None,
        checks=checks,
    )


def limits_of(job: Job, target: str) -> Limits:
    """Of target and recipe."""
    exporter = EXPORTERS[target]
    original = FORMS[target].merges and job.merge_into == "original"
    return (exporter.limits_original if original else exporter.limits).under(job.loaded.recipe.export.gate)


def _checks(job: Job, exporter: Exporter, folder: Path, expected: Reference, limits: Limits) -> Iterator[GateCheck]:
    try:
        with disk_failures(folder), memory_guard("loading the artifact", SMALLER):
            model = exporter.load(job, folder)
            facts = exporter.facts(model, job, folder, expected.texts)
    except (ModelError, MissingError, ValueError, OSError, SafetensorError) as error:
        yield GateCheck(name="loads", value=str(error).splitlines()[0], threshold="yes", passed=False)
        return
    if facts["embedding_rows"] == expected.facts["embedding_rows"]:  # else the rows' tokens mean nothing to it
        scheme = job.plan.scheme
        exact = isinstance(scheme, Qat) and exporter.engine == "transformers"
        pinned = exporter.format in ("adapter", "merged") and job.merge_into != "original"
        with memory_guard("asking the artifact", SMALLER):
            yield from _quality(model, job, expected, limits, exact=exact, pinned=pinned and not exact)
        if isinstance(scheme, Qat):
            read = exporter.reader(job, folder) or _reader(model)
            yield _rounded_weights(job, scheme, read)
            if scheme.target.observes:
                yield _input_scales(job, read)
    for name, wanted in expected.facts.items():
        given = facts[name]
        yield GateCheck(name=name, value=shown(given), threshold=shown(wanted), passed=given == wanted)


def _rows(job: Job) -> Dataset:
    """The first held-out rows, or training rows where none are held out: those that the run keeps, if it does."""
    if job.target.rows:
        return read_rows(job.target.rows, KEPT).rows
    recipe, tokenizer = job.target.loaded.recipe, job.plan.tokenizer
    data = job.plan.rows_for(recipe.data)
    try:
        arguments = data, tokenizer, recipe.seed, job.plan.pictures
        asked = held_out(*arguments) or prepare(*arguments).asked()
    except MissingError as error:
        raise MissingError(
            f"{error}; the gate asks on the run's rows, and {job.run.rows.name} is not in its folder: put them back, "
            "or export with --no-gate"
        ) from None
    return asked.rows.select(range(min(KEPT, len(asked.rows))))


def _answers(model: Any, job: Job, rows: Dataset) -> list[str]:
    """Greedy continuations of some prompts; none where the rows are plain text."""
    settings = EvalSection(max_new_tokens=NEW_TOKENS, batch_size=CONTINUATIONS, samples=CONTINUATIONS)
    return [answer.given for answer in answer_rows(model, job.plan.tokenizer, rows, settings, job.plan.pictures)]


def _measured(model: Any, job: Job, expected: Reference) -> Likelihood:
    pad, pictures = pad_token_id(job.plan.tokenizer), job.plan.pictures
    return measure(model, expected.passages, batch_size=BATCH, pad=pad, pictures=pictures, against=expected.log_probs)


def _quality(
    model: Any, job: Job, expected: Reference, limits: Limits, *, exact: bool, pinned: bool
) -> Iterator[GateCheck]:
    """How far the artifact is from the model as trained; `exact`: no farther than products in another order are;
    `pinned`: a mixture that misses a limit is asked again with each token sent to the experts that the training's
    model chose, and is to choose nearly the same itself."""
    found = _measured(model, job, expected)
    checks = list(closeness(found, expected, limits))
    if pinned and expected.choices.given and not all(check.passed for check in checks):
        free = next(check for check in checks if check.name == "top1_agreement")
        with expected.choices.followed(model) as same:
            found = _measured(model, job, expected)
        checks = list(closeness(found, expected, limits))
        checks.append(GateCheck(name="same_experts", value=same(), threshold=SAME, passed=same() >= SAME))
        checks.append(GateCheck(name="top1_agreement_of_own_experts", value=free.value, threshold=None, passed=True))
    yield from checks
    if expected.answers:
        given = _answers(model, job, expected.rows)
        yield same_continuations(given, expected, exact=exact)
    if exact and found.divergence and found.divergence.farthest is not None:
        farthest, most = float(found.divergence.farthest.max()), ROUNDING * torch.finfo(getattr(torch, job.dtype)).eps
        value = farthest if math.isfinite(farthest) else str(farthest)
        yield GateCheck(name="largest_difference", value=value, threshold=most, passed=farthest <= most)


def closeness(found: Likelihood, expected: Reference, limits: Limits) -> Iterator[GateCheck]:
    """Of what an artifact makes of the reference's passages, with its divergence."""
    assert found.divergence is not None
    measured = {
        "kl": float(found.divergence.kl.mean()),
        "top1_agreement": float(found.divergence.agrees.mean()),
        "perplexity_increase": found.perplexity() / expected.likelihood.perplexity() - 1,
    }
    for name, value in measured.items():
        limit: float = getattr(limits, name)
        # False for NaN, so a model that computes no numbers does not pass.
        passed = value >= limit if name == "top1_agreement" else value <= limit
        told = value if math.isfinite(value) else str(value)  # JSON has no NaN
        yield GateCheck(name=name, value=told, threshold=limit, passed=passed)


def same_continuations(given: list[str], expected: Reference, *, exact: bool = False) -> GateCheck:
    """The share of continuations that are the reference's; told only, unless they are to be `exact`."""
    same = sum(a == b for a, b in zip(given, expected.answers, strict=True)) / len(given)
    return GateCheck(
        name="same_continuations", value=same, threshold=1 if exact else None, passed=same == 1 or not exact
    )


def _reader(model: nn.Module) -> Read:
    """The weights of a loaded model, as it multiplies with them."""
    tensors, modules = model.state_dict(), dict(model.named_modules())

    def read(name: str) -> torch.Tensor | None:
        module = modules.get(name.removesuffix(".weight"))
        if isinstance(module, nn.Linear):
            return dequantized_weight(module).cpu()
        return tensors[name].cpu() if name in tensors else None

    return read


def _rounded_weights(job: Job, scheme: Qat, read: Read) -> GateCheck:
    """How many weights of the artifact are not, to the bit, what those as trained are rounded to."""
    known, different = scheme.roundings(job.weights.model), 0
    # bitsandbytes rounds the scales of nf4 on a GPU in another order than on a CPU; all others are the same there.
    there = job.plan.device.kind if scheme.target.layer and scheme.target.layer.data_type == "nf4" else "cpu"
    for tensors in job.weights.groups():
        roundings = scheme.settled(known, tensors, job.learnt.scales if job.learnt else {})
        for name, merged in tensors.items():
            rounding, given = roundings.get(name.removesuffix(".weight")), read(name)
            wanted = rounding(merged.to(there)).values.cpu() if rounding else merged
            if given is not None and name in job.weights.beside:
                wanted = wanted.to(given.dtype)  # of its files, or of a loaded model
            different += wanted.numel() if given is None else int((given.float() != wanted.float()).sum())
    return GateCheck(name="different_weights", value=different, threshold=0, passed=different == 0)


def _input_scales(job: Job, read: Read) -> GateCheck:
    """How many layers of the artifact scale their inputs by another number than that of the training."""
    assert job.learnt is not None
    dtype, different = getattr(torch, job.dtype), 0
    for name, largest in job.learnt.largest_inputs.items():
        given = read(f"{name}.input_scale")
        different += given is None or not torch.equal(given.reshape(()), static_scale(torch.tensor(largest), dtype))
    return GateCheck(name="different_input_scales", value=different, threshold=0, passed=different == 0)


def shown(value: Any) -> float | str:
    if isinstance(value, list) and value and isinstance(value[0], list):
        digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()
        return f"{sum(map(len, value))} tokens, SHA-256 {digest[:12]}"
    if isinstance(value, dict):
        return ", ".join(f"{token} {number}" for token, number in value.items()) or "none"
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _worst_weight(job: Job, read: Read) -> str | None:
    """Name and signal-to-noise ratio of the weight that is farthest from what it should be; None if all are exact."""
    worst, noisiest = None, math.inf
    for tensors in job.weights.groups():
        for name, expected in tensors.items():
            given = read(name)
            if given is None:
                return f"{name}, which is missing"
            if given.shape != expected.shape:
                return f"{name}, which is {list(given.shape)} and not {list(expected.shape)}"
            noise = float((given.double() - expected.double()).square().sum())
            ratio = decibels(float(expected.double().square().sum()), noise)
            if ratio < noisiest:
                worst, noisiest = name, ratio
    return f"{worst}, {noisiest:.1f} dB" if worst else None
