"""From a file of rows to what is learnt, seen from outside: `qft check` with its rows, counts and refusals."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qft.data.encoded import EncodedRows
from qft.data.prepare import Prepared, held_out, prepare
from qft.data.shown import shown_rows
from qft.data.template import IGNORED
from qft.errors import DataError
from qft.recipe.data import DataSection
from tests.support.cli import qft
from tests.support.models import CHATML, byte_tokenizer
from tests.support.rows import chat, write_jsonl

RecipeFile = Callable[..., Path]

FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.last %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Drops the thoughts of every turn but the last."""


def thinking(number: int) -> dict[str, Any]:
    """Two turns, each with a thought."""
    turns = chat(f"ask {number}", f"answer {number}")["messages"] + chat("and then", "that")["messages"]
    return {"messages": [t | {"reasoning_content": "hm"} if t["role"] == "assistant" else t for t in turns]}


def section(path: Path, **data: Any) -> DataSection:
    return DataSection.model_validate({"train": str(path), "max_length": 512, **data})


def prepared(path: Path, template: str = CHATML, **data: Any) -> Prepared:
    return prepare(section(path, **data), byte_tokenizer(template), 0)


def read(template: str, ids: list[int]) -> str:
    return str(byte_tokenizer(template).decode([i for i in ids if i != IGNORED]))


@pytest.fixture
def thoughts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "thoughts.jsonl", [thinking(i) for i in range(20)])


def test_a_turn_of_which_the_thought_is_dropped_later_is_learnt_where_it_is_asked(thoughts: Path) -> None:
    found = prepared(thoughts, FORGETS)
    first, second = (found.train[i] for i in (0, 1))
    assert [first["row"], second["row"]] == [0, 0]
    assert read(FORGETS, first["labels"]) == "<think>hm</think>answer 0<|im_end|>"
    assert read(FORGETS, second["labels"]) == "<think>hm</think>that<|im_end|>"
    assert read(FORGETS, second["input_ids"]).startswith(
        "<|im_start|>user\nask 0<|im_end|>\n<|im_start|>assistant\nans"
    )
    [facts] = found.sources
    assert (facts.rows, facts.examples) == (20, 40)
    assert facts.repeated_tokens == sum(found.train[i]["length"] for i in range(0, 40, 2))
    assert facts.supervised_tokens == sum(found.train["supervised"])


def test_examples_of_one_row_are_held_out_and_weighted_together(thoughts: Path) -> None:
    found = prepared(thoughts, FORGETS, eval_fraction=0.25)
    assert found.eval is not None
    assert [len(found.train), len(found.eval)] == [30, 10]
    assert not {*found.train["row"]} & {*found.eval["row"]}
    alone = held_out(section(thoughts, eval_fraction=0.25), byte_tokenizer(FORGETS), 0)
    assert isinstance(alone, EncodedRows)
    assert alone.rows.to_list() == found.eval.to_list()
    half = prepare(
        DataSection.model_validate({"train": {"path": str(thoughts), "weight": 1.5}, "max_length": 512}),
        byte_tokenizer(FORGETS),
        0,
    )
    assert len(half.train) == 60
    assert all(half.train["row"].count(row) in (2, 4) for row in range(20))


def test_all_tokens_are_learnt_once_and_the_dropped_thoughts_too(thoughts: Path) -> None:
    first, second = (prepared(thoughts, FORGETS, loss_on="all").train[i] for i in (0, 1))
    assert read(FORGETS, first["labels"]) == "<think>hm</think>answer 0<|im_end|>"
    assert second["labels"] == second["input_ids"]


def test_several_processes_make_the_same_examples(thoughts: Path) -> None:
    environment = os.environ
    assert prepared(thoughts, FORGETS, num_proc=2).train.to_list() == prepared(thoughts, FORGETS).train.to_list()
    assert os.environ is environment


def test_fields_that_nobody_reads_are_counted_and_can_be_meant(tmp_path: Path) -> None:
    rows = [chat("a", "b") | {"id": 1}, chat("a", "b") | {"id": 2, "score": None}, chat("a", "b") | {"lang": "en"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert prepared(path).sources[0].unread == {"id": 2, "lang": 1}
    assert prepared(path, ignore_fields=["id", "lang"]).sources[0].unread == {}


def test_a_field_of_messages_is_left_out_by_its_name(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [thinking(0)])
    with pytest.raises(
        DataError, match=r":1: messages\.1\.reasoning_content: .*ignore_fields: \[messages\.reasoning_c"
    ):
        prepared(path)
    found = prepared(path, ignore_fields=["messages.reasoning_content"])
    assert read(CHATML, found.train[0]["labels"]) == "answer 0<|im_end|>that<|im_end|>"


def test_a_file_of_columns_says_what_a_file_of_lines_says(tmp_path: Path) -> None:
    """Parquet has every field in every row; where others are filled, this one has none."""
    template = CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ c }}{% endfor %}"
    )
    template = template.replace("{{ c }}", "{{ c.function.name }}{{ c.function.arguments | tojson }}")
    ask = {"role": "user", "content": "weather?"}
    rows: list[dict[str, Any]] = [
        {"messages": [ask, {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}]}
        for function in ({"name": "now", "arguments": {"city": "Oslo"}}, {"name": "later", "arguments": {"days": 2}})
    ]
    rows = [{"system": None, **row} for row in rows] + [{"system": "be brief", **chat("hi", "hello")}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    columns, lines = (
        prepared(path, template) for path in (tmp_path / "rows.parquet", write_jsonl(tmp_path / "r.jsonl", rows))
    )
    assert columns.train["input_ids"] == lines.train["input_ids"]
    assert '{"city": "Oslo"}<|im_end|>' in read(template, columns.train[0]["input_ids"])
    assert columns.sources[0].unread == lines.sources[0].unread == {}


def test_lists_and_objects_may_be_json_text_as_files_of_columns_have_them(tmp_path: Path) -> None:
    turns = chat("hi", "hello")["messages"]
    (tmp_path / "rows.csv").write_text('messages,tools\n"' + json.dumps(turns).replace('"', '""') + '",\n')
    assert read(CHATML, prepared(tmp_path / "rows.csv").train[0]["labels"]) == "hello<|im_end|>"


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_template_file_may_begin_with_a_byte_order_mark(recipe_file: RecipeFile, tmp_path: Path, mark: str) -> None:
    (tmp_path / "own.jinja").write_text(mark + CHATML, "utf-8")
    recipe = recipe_file(quant=None, data={"chat_template": str(tmp_path / "own.jinja")})
    document = json.loads(qft("check", recipe, "--show", 1, "--json").stdout)
    assert document["shown"][0]["text"].startswith("<|im_start|>user")
    assert document["data"]["chat_template"] == str(tmp_path / "own.jinja")


def test_a_template_that_is_no_jinja_is_told_once_with_its_line(recipe_file: RecipeFile, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{% for m in messages %}\n{{ m.content }}\n{% endfo %}")
    result = qft("check", recipe_file(quant=None, data={"chat_template": str(tmp_path / "own.jinja")}))
    assert result.exit_code == DataError.exit_code
    assert result.stderr.count("own.jinja:3: not a Jinja template: ") == 1
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_argument_that_no_template_reads_is_refused_at_its_line(recipe_file: RecipeFile) -> None:
    result = qft("check", recipe_file(quant=None, data={"template_kwargs": {"enable_thinkin": False}}))
    assert result.exit_code == 2
    assert "recipe.yaml:" in result.stderr
    assert "data.template_kwargs: enable_thinkin: the chat template reads nothing of that name" in result.stderr


def test_without_a_template_the_plan_says_how_rows_are_read(recipe_file: RecipeFile, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(4)])
    recipe = recipe_file(quant=None, data={"train": str(rows), "eval_fraction": 0, "template": "none"})
    document = json.loads(qft("check", recipe, "--show", 1, "--json").stdout)
    assert document["data"]["chat_template"] == "none"
    assert document["shown"] == [
        {"place": f"{rows}:1", "text": "0+1=1<|im_end|>", "learnt": ["1<|im_end|>"], "images": []}
    ]
    assert "answers follow their questions, then the end token" in qft("check", recipe).stdout


def test_rows_are_shown_of_each_source_with_what_is_learnt(recipe_file: RecipeFile, tmp_path: Path) -> None:
    sources = [write_jsonl(tmp_path / f"{name}.jsonl", [chat(name, f"it is {i}") for i in range(3)]) for name in "ab"]
    turns = [*chat("one", "é1")["messages"], *chat("two", "<b>")["messages"]]
    held = write_jsonl(tmp_path / "held.jsonl", [{"messages": turns}])
    train = [{"path": str(path), "weight": 2} for path in sources]
    recipe = recipe_file(quant=None, data={"train": train, "eval": str(held), "eval_fraction": 0})
    shown = json.loads(qft("check", recipe, "--show", 2, "--json").stdout)["shown"]
    places = [f"{path}:{line}" for path in sources for line in (1, 2)]
    assert [row["place"] for row in shown] == [*places, f"{held}:1"]
    assert shown[0]["text"] == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nit is 0<|im_end|>\n"
    assert shown[0]["learnt"] == ["it is 0<|im_end|>"]
    assert shown[-1]["learnt"] == ["é1<|im_end|>", "<b><|im_end|>"]
    printed = qft("check", recipe, "--show", 1).stdout
    assert "«é|1|<|im_end|>»" in printed
    assert "«<|b|>|<|im_end|>»" in printed
    assert "[bold" not in printed
    assert json.loads(qft("check", recipe, "--json").stdout)["shown"] == []


def test_tokens_of_a_shown_row_make_up_its_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [chat("né🎉\x1b[1m", "漢字 done")])
    [row] = shown_rows(prepared(path), byte_tokenizer(), 1)
    assert "".join(token.text for token in row.pieces) == row.text
    assert "".join(token.text for token in row.pieces if token.learnt) == "".join(row.learnt) == "漢字 done<|im_end|>"
    assert [token.text for token in row.pieces if token.learnt][:3] == ["漢", "字", " "]
