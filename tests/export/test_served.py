"""The gate asks vLLM: its answer is compared with the model as trained, and whoever cannot be asked is refused first.

Here transformers answers in the place of vLLM; tests/serving asks vLLM itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qft.documents.export import Served
from qft.errors import GateError, RecipeError
from qft.export import export
from qft.export.gate import served
from qft.export.gate.verify import Reference
from qft.export.job import Job
from qft.measure.likelihood import grouped_divergence
from qft.progress import View
from qft.serving.vllm import Question, Refused, rank_limit, rank_of
from tests.support.cli import qft
from tests.support.exports import job_of, options, refusal

PYTHON = "/an/environment/bin/python"


def answered(question: Question) -> dict[str, Any]:
    """What vllm_job.py would write, by transformers."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(question.model),
        AutoTokenizer.from_pretrained(question.model),
    )
    rows = []
    for ids, scored in zip(question.rows, question.scored, strict=True):
        with torch.no_grad():
            found = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        places = []
        for at in scored:
            likeliest = found[at - 1].topk(question.likeliest).indices.tolist()
            told = list(dict.fromkeys([ids[at], *likeliest]))
            places.append({"ids": told, "log_probs": found[at - 1][told].tolist()})
        rows.append(places)
    answers = []
    for prompt in question.prompts:
        one = torch.tensor([prompt])
        seen = torch.ones_like(one)  # else what ends a turn would be taken for padding
        out = model.generate(one, attention_mask=seen, max_new_tokens=question.new_tokens, do_sample=False)
        ids = out[0, len(prompt) :].tolist()
        answers.append(ids[: ids.index(2)] if 2 in ids else ids)
    return {
        "version": "1.2.3",
        "seconds_to_start": 1.0,
        "vocabulary": model.config.vocab_size,
        "ends": [tokenizer.eos_token_id],
        "token_ids": [tokenizer.encode(text, add_special_tokens=False) for text in question.texts],
        "bos_count": tokenizer(question.messages[0]["content"]).input_ids.count(tokenizer.bos_token_id),
        "chat": tokenizer.apply_chat_template(question.messages, add_generation_prompt=True, return_dict=False),
        "log_probs": rows,
        "answers": answers,
        "generated_per_second": 100.0,
    }


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[Question]:
    """Lets transformers answer; the questions that came."""
    asked: list[Question] = []

    def ask(python: str, question: Question, folder: Path, *, on_gpu: bool) -> Mapping[str, Any]:
        assert python == PYTHON
        asked.append(question)
        return answered(question)

    monkeypatch.setattr(served, "ask", ask)
    monkeypatch.setattr(served, "find_problem", lambda python: None)
    return asked


def test_what_the_serving_engine_finds_is_in_the_document_and_the_card(
    run: Path, tmp_path: Path, engine: list[Question]
) -> None:
    ran = qft(
        "export", run, "--to", "merged", "--to", "gguf", "--out", tmp_path, "--set", f"export.engine_python={PYTHON}"
    )
    assert ran.exit_code == 0, ran.stderr
    assert "Served by vllm 1.2.3" in ran.stdout
    [question] = engine  # of the GGUF file llama.cpp is asked
    assert question.model.startswith(str(tmp_path))
    assert question.dtype == "bfloat16"
    assert question.max_length == max(map(len, question.rows)) + 16
    gate = json.loads((tmp_path / "merged" / "export.json").read_text())["gate"]
    told = Served.model_validate(gate["served"])
    figures = {check.name: check.value for check in told.checks}
    own = {check["name"]: check["value"] for check in gate["checks"]}
    assert 0 <= float(figures["kl"]) <= own["kl"] + 1e-6
    assert figures["perplexity_increase"] == pytest.approx(own["perplexity_increase"], abs=2e-3)
    assert all(check.passed for check in told.checks)
    assert "Then loaded by vllm 1.2.3 and compared likewise" in (tmp_path / "merged" / "README.md").read_text()
    assert json.loads((tmp_path / "gguf" / "export.json").read_text())["gate"]["served"] is None


@pytest.fixture(scope="module")
def whole(asked: tuple[Job, Reference], tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, dict[str, Any]]:
    """The run as a job whose gate asks an engine, and that engine's answer about its merged weights."""
    out = tmp_path_factory.mktemp("served")
    export(asked[0].run.folder, options("merged", out=out), View())
    job = replace(asked[0], loaded=asked[0].loaded.having(export={"engine_python": PYTHON}), scratch=out)
    return job, answered(served.question_of(job, out / "merged", asked[1], adapter=False))


def unlike(answer: dict[str, Any]) -> None:
    for row in answer["log_probs"]:
        for place in row:
            place["log_probs"] = [-6.0 + 0.001 * at for at in range(len(place["ids"]))]


def other_tokens(answer: dict[str, Any]) -> None:
    answer["token_ids"][0].append(5)


def another_end(answer: dict[str, Any]) -> None:
    answer["ends"] = [7]


def double_bos(answer: dict[str, Any]) -> None:
    answer["bos_count"] += 1


def another_template(answer: dict[str, Any]) -> None:
    answer["chat"] = answer["chat"][:-1]


def more_embeddings(answer: dict[str, Any]) -> None:
    answer["vocabulary"] += 64


def not_a_number(answer: dict[str, Any]) -> None:
    answer["log_probs"][0][0]["log_probs"] = [float("nan")] * len(answer["log_probs"][0][0]["ids"])


def refused(answer: dict[str, Any]) -> None:
    raise Refused("ValueError: no kernel for it", "1.2.3")


BROKEN: dict[Callable[[dict[str, Any]], None], set[str]] = {
    unlike: {"kl", "top1_agreement", "perplexity_increase"},
    other_tokens: {"token_ids"},
    another_end: {"eos_token_id"},
    double_bos: {"bos_count"},
    another_template: {"chat_template"},
    more_embeddings: {"embedding_rows"},
    not_a_number: {"kl", "perplexity_increase"},
    refused: {"loads"},
}


@pytest.mark.parametrize("way", [None, *BROKEN])
def test_an_engine_that_finds_something_else_refuses(
    way: Callable[[dict[str, Any]], None] | None,
    whole: tuple[Job, dict[str, Any]],
    asked: tuple[Job, Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, answer = whole

    def ask(*_: Any, **__: Any) -> dict[str, Any]:
        given = deepcopy(answer)
        if way:
            way(given)
        return given

    monkeypatch.setattr(served, "ask", ask)
    found = served.judge_served(job, "merged", job.scratch / "merged", asked[1])
    missed = {check.name for check in found.checks if not check.passed}
    assert missed == (BROKEN[way] if way else set())
    assert [job.plan.tokenizer.decode(ids) for ids in answer["answers"]] == asked[1].answers


def test_a_refusal_of_the_engine_sets_the_artifact_aside(
    run: Path, tmp_path: Path, engine: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: Any, **__: Any) -> dict[str, Any]:
        raise Refused("ValueError: no kernel for it", "1.2.3")

    monkeypatch.setattr(served, "ask", ask)
    error = refusal(run, "merged", out=tmp_path, engine_python=Path(PYTHON))
    assert isinstance(error, GateError)
    assert "vllm's loads is 'vLLM 1.2.3: ValueError: no kernel for it', not 'yes'" in str(error)
    document = json.loads((tmp_path / "merged.failed" / "export.json").read_text())
    assert document["passed"] is document["gate"]["passed"] is False
    assert document["gate"]["served"]["version"] == "1.2.3"


def test_who_cannot_be_asked_is_refused_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    missing = refusal(run, "merged", out=tmp_path / "out", engine_python=Path(sys.executable))
    assert isinstance(missing, RecipeError)
    assert str(missing).startswith(f"--engine-python: {sys.executable} cannot import vllm (ModuleNotFoundError")
    text = str(refusal(run, "merged", out=tmp_path / "out", overrides=("export.engine_python=nowhere/python",)))
    assert "export.engine_python:" in text
    assert "nowhere/python does not exist" in text
    asked = {"out": tmp_path / "out", "engine_python": Path(sys.executable)}
    assert "vLLM is not asked about gguf, gguf-f16" in str(refusal(run, "gguf", "gguf-f16", **asked))
    assert "--no-gate switches off" in str(refusal(run, "merged", gate=False, **asked))
    refused_too = qft("export", run, "--to", "merged", "--check-target", "here", "--engine-python", sys.executable)
    assert "--engine-python" in refused_too.stderr
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_asked_about_on_the_original_weights(
    run: Path, tiny_model: Path, asked: tuple[Job, Reference]
) -> None:
    job = job_of(run)
    question = served.question_of(job, run / "adapter", asked[1], adapter=True)
    assert (question.model, question.tokenizer, question.adapter) == (str(tiny_model), *[str(run / "adapter")] * 2)
    assert question.rank == 8


def test_the_rank_that_vllm_takes_is_no_smaller_than_any_layers() -> None:
    assert rank_of({"r": 16, "rank_pattern": {"q_proj": 40}}) == 40
    assert [rank_limit(rank) for rank in (1, 8, 9, 40, 512)] == [8, 8, 16, 64, 512]
    with pytest.raises(Exception, match="rank 512 at most, this one has 513"):
        rank_limit(513)


def test_what_is_known_of_some_tokens_bounds_the_divergence() -> None:
    drawn = np.random.default_rng(0).normal(size=(2, 300))
    before, after = (row - np.log(np.exp(row).sum()) for row in drawn.astype(np.float32))
    exact = float((np.exp(before) * (before - after)).sum())
    bounds = [grouped_divergence(before, range(some), after[:some].tolist()) for some in (1, 20, 299)]
    assert bounds[0] < bounds[1] < bounds[2]
    assert bounds[2] == pytest.approx(exact, rel=1e-4)
    assert grouped_divergence(before, range(20), before[:20].tolist()) == pytest.approx(0, abs=1e-6)
