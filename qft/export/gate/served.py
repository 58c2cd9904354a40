"""The gate's second half: the artifact loaded by vLLM, in the environment of export.engine_python, and compared with
the model as it was trained by the same limits."""

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from qft.data.template import IGNORED
from qft.documents.export import GateCheck, Served
from qft.errors import RecipeError
from qft.export.gate.verify import (
    CONTINUATIONS,
    NEW_TOKENS,
    Reference,
    closeness,
    limits_of,
    same_continuations,
    shown,
)
from qft.export.job import ExportOptions, Job
from qft.export.targets.base import QUESTION, Limits
from qft.export.targets.merged import Merged
from qft.files import atomic_folder
from qft.measure.likelihood import Divergence, Likelihood, Passage, grouped_divergence
from qft.model.adapter import read_adapter_config
from qft.model.handover import FORMS
from qft.model.merge import MergedWeights
from qft.recipe import LoadedRecipe
from qft.serving.vllm import Question, Refused, ask, find_problem, rank_limit, rank_of

ENGINE = "vllm"
LIKELIEST = 64
"""Tokens whose log probabilities vLLM is asked for at each place."""


def find_engine(loaded: LoadedRecipe, options: ExportOptions, targets: Sequence[str]) -> LoadedRecipe:
    """The recipe with the Python of the command line, if it names one. Raises RecipeError if the recipe's or that one
    does not run vLLM, or is to be asked about nothing."""
    given, field = options.engine_python, "--engine-python"
    python = os.path.abspath(given.expanduser()) if given else loaded.recipe.export.engine_python
    if python is None or (given is None and not options.gate):
        return loaded
    problem = _problem(python, targets, gate=options.gate)
    if problem:
        text = f"{field}: {problem}" if given else loaded.problem("export.engine_python", problem)
        raise RecipeError(text)
    return loaded.having(export={"engine_python": python})


def _problem(python: str, targets: Sequence[str], *, gate: bool) -> str | None:
    if not gate:
        return "asks vLLM for the gate, which --no-gate switches off; leave out one of them"
    if not any(map(_is_asked, targets)):
        given = ", ".join(targets)
        return f"vLLM is not asked about {given}, but llama.cpp; leave it out, or export merged too"
    return find_problem(python)


def _is_asked(target: str) -> bool:
    return FORMS[target].kind is None


def is_served(job: Job, target: str) -> bool:
    """Whether vLLM is asked about this target."""
    return job.loaded.recipe.export.engine_python is not None and _is_asked(target)


def require_text(job: Job, expected: Reference) -> None:
    """Raise RecipeError if vLLM is to be asked about rows with images: it gets token ids alone."""
    if job.loaded.recipe.export.engine_python is not None and any(passage.images for passage in expected.passages):
        text = "vLLM is asked about rows of text, and the run's held-out rows have images; leave it out"
        raise RecipeError(job.loaded.problem("export.engine_python", text))


def judge_served(job: Job, target: str, folder: Path, expected: Reference) -> Served:
    """Load the artifact in `folder` by the vLLM of export.engine_python and compare; what it does not load does not
    pass. Raises ModelError if vLLM itself cannot be asked."""
    python = job.loaded.recipe.export.engine_python
    assert python is not None
    adapter = target == "adapter"
    job.view.note(f"Loading {target} by the vLLM of {python}")
    with TemporaryDirectory(dir=job.scratch) as work:
        question = question_of(job, folder, expected, adapter=adapter)
        _free_device()
        try:
            answer = ask(python, question, Path(work), on_gpu=job.plan.device.kind == "cuda")
            checks = list(_checks(job, answer, question, expected, _limits(job, target)))
        except Refused as error:
            answer = {"version": error.version}
            checks = [GateCheck(name="loads", value=str(error), threshold="yes", passed=False)]
    return Served(
        engine=ENGINE,
        version=answer["version"],
        base="the original weights" if adapter else None,
        likeliest=LIKELIEST,
        seconds_to_start=answer.get("seconds_to_start"),
        generated_per_second=answer.get("generated_per_second"),
        checks=checks,
    )


def _limits(job: Job, target: str) -> Limits:
    """vLLM puts an adapter on the original weights, which one of a quantized base has not seen."""
    unseen = target == "adapter" and job.merge_into is not None
    return Merged.limits_original.under(job.loaded.recipe.export.gate) if unseen else limits_of(job, target)


def question_of(job: Job, folder: Path, expected: Reference, *, adapter: bool) -> Question:
    """What vLLM is asked of the artifact in `folder`. Raises ModelError for an adapter that it does not take."""
    prompts = _prompts(expected)
    longest = max(map(len, (*(passage.input_ids for passage in expected.passages), *prompts)))
    return Question(
        model=str((_base(job) if adapter else folder).resolve()),
        tokenizer=str(folder.resolve()),
        adapter=str(folder.resolve()) if adapter else None,
        rank=rank_limit(rank_of(read_adapter_config(folder))) if adapter else 0,
        dtype=job.dtype,
        trust_remote_code=job.plan.recipe.model.trust_remote_code,
        max_length=longest + NEW_TOKENS,
        seed=job.loaded.recipe.seed,
        rows=[list(passage.input_ids) for passage in expected.passages],
        scored=[_scored(passage) for passage in expected.passages],
        likeliest=LIKELIEST,
        texts=expected.texts,
        messages=QUESTION if _chat(job) else [],
        prompts=prompts,
        stops=expected.stops,
        new_tokens=NEW_TOKENS,
    )


def _base(job: Job) -> Path:
    """The base's original weights as vLLM reads them: their folder, or what is written of another file."""
    checkpoint = job.plan.checkpoint
    if checkpoint.gguf_file is None and any(checkpoint.folder.glob("*.safetensors")):
        return checkpoint.folder
    written = job.scratch / "base"
    if not written.exists():
        with atomic_folder(written) as folder:
            MergedWeights(job.plan, None, job.dtype, "original" if job.merge_into else None).write(folder)
    return written


def _scored(passage: Passage) -> list[int]:
    return [at for at, label in enumerate(passage.labels) if at and label != IGNORED]


def _prompts(expected: Reference) -> list[list[int]]:
    """Those that the model as trained has continued."""
    asked = expected.rows.select(range(min(CONTINUATIONS, len(expected.rows))))
    return [list(row["input_ids"][: row["answer_start"]]) for row in asked if row["answer_start"] > 0]


def _chat(job: Job) -> list[int] | None:
    """The question as the training's tokenizer renders it; None if there is no template, or it wants more."""
    try:
        return list(job.plan.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False))
    except Exception:  # a template is a program: it can fail with more than jinja's own errors
        return None


def _checks(
    job: Job, answer: Mapping[str, Any], question: Question, expected: Reference, limits: Limits
) -> Iterator[GateCheck]:
    vocabulary = expected.log_probs.values.shape[1]
    if all(i < vocabulary for row in answer["log_probs"] for place in row for i in place["ids"]):
        yield from closeness(_likelihood(answer["log_probs"], expected), expected, limits)
        if expected.answers:
            given = [job.plan.tokenizer.decode(ids) for ids in answer["answers"]]
            yield same_continuations(given, expected)
    tokenizer, facts = job.plan.tokenizer, expected.facts
    own_end = {tokenizer.eos_token_id} - {None}
    wanted: dict[str, Any] = {
        "embedding_rows": (answer["vocabulary"], facts["embedding_rows"]),
        "token_ids": (answer["token_ids"], facts["token_ids"]),
        "eos_token_id": (answer["ends"], sorted(own_end | {*facts["eos_token_id"]})),
    }
    if question.messages:
        wanted["bos_count"] = answer["bos_count"], facts["bos_count"]
        wanted["chat_template"] = [answer["chat"]], [_chat(job)]
    for name, (given, right) in wanted.items():
        yield GateCheck(name=name, value=shown(given), threshold=shown(right), passed=given == right)


def _likelihood(told: list[list[dict[str, Any]]], expected: Reference) -> Likelihood:
    """Of vLLM's answer: of each passage, of each scored place, ids and their log probabilities, the taught first."""
    nll = np.array([-sum(place["log_probs"][0] for place in row) for row in told])
    places = [place for row in told for place in row][: expected.log_probs.tokens]
    kl, agrees = np.zeros(len(places)), np.zeros(len(places), dtype=bool)
    for at, place in enumerate(places):
        reference = np.asarray(expected.log_probs.values[at])
        kl[at] = grouped_divergence(reference, place["ids"], place["log_probs"])
        agrees[at] = place["ids"][int(np.argmax(place["log_probs"]))] == int(reference.argmax())
    tokens = np.array([len(row) for row in told], dtype=np.int64)
    return Likelihood(nll, tokens, Divergence(kl, agrees))


def _free_device() -> None:
    """Give back what torch keeps of a GPU: vLLM takes most of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
