"""`qft eval --url` and `qft chat --url`, against a server whose answers are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from qft.cli import app
from tests.support.cli import qft
from tests.support.rows import chat, write_jsonl
from tests.support.servers import LOG_PROB, as_json, echoes, serving, streamed

TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALLED = {"function": {"name": "add", "arguments": {"a": 1}}}


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Path:
    rows = [chat("say 1", "1"), chat("say 2", "2"), chat("say 3", "no")]
    write_jsonl(tmp_path / "held.jsonl", rows)
    values = {
        "model": {"path": str(tiny_model), "device": "cpu"},
        "data": {"train": "held.jsonl", "eval": "held.jsonl"},
        "eval": {"metrics": ["exact_match"], "max_new_tokens": 5},
        "output_dir": "run",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def test_a_recipes_rows_are_asked_and_scored_and_read(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving(echoes) as (url, asked):
        ran = qft("eval", recipe, "--url", url, "--concurrency", 2, "--out", out, "--json")
    assert ran.exit_code == 0, ran.stderr
    [target] = json.loads(ran.stdout)["targets"]
    assert target["scores"]["exact_match"]["value"] == pytest.approx(2 / 3)
    assert target["perplexity"] == pytest.approx(math.exp(-LOG_PROB))
    assert target["weight_bytes"] is target["decode_tokens_per_second"] is None
    [load] = target["served_by"]["loads"]
    assert (load["concurrent"], load["requests"], load["tokens"]) == (2, 4, 12)
    answers = [body for path, body in asked if path == "/v1/chat/completions" and body["max_tokens"] == 5]
    assert sorted(body["messages"][-1]["content"] for body in answers) == ["say 1", "say 2", "say 3"]
    assert {(body["model"], body["temperature"]) for body in answers} == {("tiny", 0)}
    [lines] = [path.read_text().splitlines() for path in (out / "answers").iterdir()]
    assert [json.loads(line)["right"] for line in lines] == [True, True, False]
    assert "Asked at once" in (out / "report.html").read_text()


def test_a_file_of_rows_needs_no_model_and_rows_that_call_tools_are_told(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"instruction": "say", "input": "x", "output": " x "},
        {"prompt": "say y", "completion": "z"},
    ]
    with serving(echoes) as (url, asked):
        for row, value in zip(rows, (1, 0), strict=True):
            data = write_jsonl(tmp_path / "rows.jsonl", [row])
            ran = qft("eval", "--url", url, "--data", data, "--concurrency", 0, "--json")
            [target] = json.loads(ran.stdout)["targets"]
            assert (target["scores"]["exact_match"]["value"], target["perplexity"]) == (value, None)
            assert target["served_by"]["loads"] == []
            assert "no perplexity: name the run" in ran.stderr
        called = {"messages": [{"role": "user", "content": "add"}, {"role": "assistant", "tool_calls": [CALLED]}]}
        more = [{"role": "tool", "content": "is 2"}, {"role": "assistant", "content": "2"}]
        longer = {"messages": [*called["messages"], *more], "tools": [TOOL]}
        data = write_jsonl(tmp_path / "rows.jsonl", [called, longer])
        ran = qft("eval", "--url", url, "--data", data, "--concurrency", 0, "--json")
    assert "1 rows are left out" in ran.stderr
    assert "calls a tool" in ran.stderr
    body = asked[-1][1]
    assert body["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    assert body["tools"] == [TOOL]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--reference", "x"), 2, "--reference: compares distributions"),
        (("--layers",), 2, "--layers: looks into a model"),
        (("--harness", "arc_easy"), 2, "--harness: needs log probabilities"),
        (("other.yaml",), 2, "--url: of one TARGET"),
        (("--data", "notes.txt"), 2, "plain text has no answers"),
        (("--model", "big"), 11, "has no model big"),
        (("--metric", "regex"), 2, "--metric regex"),
    ],
)
def test_what_makes_no_sense_is_refused(recipe: Path, words: tuple[str, ...], code: int, text: str) -> None:
    with serving(echoes) as (url, _):
        ran = qft("eval", recipe, "--url", url, *words)
    assert (ran.exit_code, text in ran.stderr) == (code, True), ran.stderr


def test_a_question_that_is_refused_is_named_and_nothing_is_written(recipe: Path, tmp_path: Path) -> None:
    """As by a chat template that takes no system, or for a row that is too long."""

    def strict(path: str, body: dict[str, Any]) -> tuple[int, str, bytes]:
        refused = as_json({"error": {"message": "System role not supported"}}, 400)
        return refused if "say 2" in str(body) else echoes(path, body)

    with serving(strict) as (url, _):
        ran = qft("eval", recipe, "--url", url, "--out", tmp_path / "out", "--json")
    assert (ran.exit_code, ran.stdout) == (11, "")
    assert "held.jsonl:2: " in ran.stderr.replace("\n", "")
    assert "System role not supported" in ran.stderr
    assert not (tmp_path / "out" / "eval.json").exists()


@pytest.mark.parametrize(
    ("told", "words"),
    {
        "refused": (as_json({"error": "prompt must be a string"}, 400), "prompt must be a string"),
        "left out": (as_json({"choices": [{"text": "a"}]}), "tells no log probabilities of what it reads"),
        "no numbers": (as_json(math.nan), "tells no log probabilities of what it reads"),
    }.values(),
)
def test_without_log_probabilities_there_is_no_perplexity_and_the_reason_is_told(
    told: tuple[int, str, bytes], words: str, recipe: Path
) -> None:
    def answers(path: str, body: dict[str, Any]) -> tuple[int, str, bytes]:
        if not body.get("echo"):
            return streamed("1")
        if b"NaN" in told[2]:
            nothing = [float("nan")] * (len(body["prompt"]) + 1)
            return as_json({"choices": [{"logprobs": {"token_logprobs": nothing}}]})
        return told

    with serving(answers) as (url, _):
        ran = qft("eval", recipe, "--url", url, "--concurrency", 0, "--json")
    assert ran.exit_code == 0, ran.stderr
    [target] = json.loads(ran.stdout)["targets"]
    assert (target["perplexity"], target["scores"]["exact_match"]["value"]) == (None, pytest.approx(1 / 3))
    assert words in ran.stderr
    assert "does not count tokens" in ran.stderr


def test_options_of_a_server_need_one() -> None:
    assert "give --url" in qft("eval", "x", "--model", "m").stderr
    assert "give --url" in qft("chat", "x", "--timeout", "3").stderr
    assert "a TARGET, or a server by --url" in qft("chat").stderr
    ran = qft("chat", "--url", "http://127.0.0.1:1", "--prompt", "Hi")
    assert (ran.exit_code, "no server listens there" in ran.stderr) == (11, True)


def test_a_conversation_is_sent_whole_and_saved(tmp_path: Path) -> None:
    saved = tmp_path / "said.jsonl"
    lines = f"/system Be brief.\nsay a\nsay b\n/save {saved}\n"
    with serving(echoes) as (url, asked):
        ran = CliRunner().invoke(app, ["chat", "--url", url, "--temperature", "0.5", "--seed", "3"], input=lines)
        one = qft("chat", "--url", url, "--prompt", "say c", "--json")
    assert (ran.exit_code, ran.stdout) == (0, "a\nb\n"), ran.stderr
    said = [message["content"] for message in asked[2][1]["messages"]]
    assert said == ["Be brief.", "say a", "a", "say b"]
    assert (asked[2][1]["temperature"], asked[2][1]["top_p"], asked[2][1]["seed"]) == (0.5, 1.0, 3)
    assert [m["content"] for m in json.loads(saved.read_text())["messages"]] == [*said, "b"]
    assert {name: json.loads(one.stdout)[name] for name in ("answer", "tokens")} == {"answer": "c", "tokens": 3}


def test_an_answer_that_breaks_off_ends_with_its_own_exit_code() -> None:
    with serving(lambda path, body: streamed("par", finish=None, done=False)) as (url, _):
        ran = qft("chat", "--url", url, "--prompt", "Hi")
    assert (ran.exit_code, "broke off after 1 pieces" in ran.stderr, ran.stdout) == (11, True, "par")


def test_an_empty_address_is_none_of_a_server() -> None:
    found = qft("chat", "--prompt", "x", "--url", "")
    assert found.exit_code == 2
    assert found.stderr.startswith("error: --url : is no address of a server")
