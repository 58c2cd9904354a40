"""Where other tools' rows come from, and what their fields are called: named so in the recipe, never left out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from qft.arrive import Kind
from tests.support.arrive import ALL, AXOLOTL, LLAMA, TRL, TUNE, kinds, translated

SCRIPT = {name: value for name, value in TRL.items() if not name.startswith("dataset")}
"""Of a script that is built on TRL's and finds its rows by keys of its own."""
CHAT = {"_component_": "torchtune.datasets.chat_dataset", "conversation_style": "openai"}
EACH = {"type": "chat_template", "path": "a/b"}


@pytest.mark.parametrize(
    ("tool", "change", "fields"),
    [
        ("Axolotl", {"datasets": [{**EACH, "field_messages": "chat"}]},
         {"data.train": [{"path": "a/b", "format": "messages", "columns": {"chat": "messages"}}]}),
        ("Axolotl", {"datasets": [{"path": "a/b", "type": "completion", "field": "body"}]},
         {"data.train": [{"path": "a/b", "format": "text", "columns": {"body": "text"}}]}),
        ("Axolotl", {"datasets": [{"path": "a/b", "type": "gpteacher"}], "chat_template": "llama3"},
         {"data.train": [{"path": "a/b", "format": "alpaca", "columns": {"response": "output"}}],
          "data.chat_template": "alpaca.jinja"}),
        ("Axolotl", {"datasets": [{"path": "a/b", "type": {"field_instruction": "q", "field_output": "a"}}]},
         {"data.train": [{"path": "a/b", "format": "alpaca", "columns": {"q": "instruction", "a": "output"}}],
          "data.chat_template": "prompt.jinja"}),
        ("Axolotl", {"datasets": [{**EACH, "roles": {"user": ["human"], "assistant": ["gpt"]}}]},
         {"data.train": [{"path": "a/b", "format": "messages"}]}),
        ("torchtune", {"dataset": {"_component_": "torchtune.datasets.chat_dataset", "source": "a/b",
                                   "conversation_column": "chat", "conversation_style": "openai"}},
         {"data.train": [{"path": "a/b", "format": "messages", "columns": {"chat": "messages"}}]}),
        ("torchtune", {"dataset": {"_component_": "torchtune.datasets.instruct_dataset", "source": "json",
                                   "data_files": "a.json", "column_map": {"input": "question"}}},
         {"data.train": [{"path": "a.json", "format": "prompt_completion",
                          "columns": {"question": "prompt", "output": "completion"}}], "data.loss_on": "assistant"}),
        ("torchtune", {"dataset": {"_component_": "torchtune.datasets.text_completion_dataset", "source": "a/b",
                                   "column": "page"}},
         {"data.train": [{"path": "a/b", "format": "text", "columns": {"page": "text"}}], "data.loss_on": "all"}),
        ("LLaMA-Factory", {"dataset_dir": "ONLINE", "dataset": "a/b"},
         {"data.train": [{"path": "a/b", "format": "alpaca"}]}),
        ("TRL", {"datasets": [{"path": "json", "data_files": "a.jsonl"}, {"path": "a/b", "columns": ["messages"]}]},
         {"data.train": [{"path": "a.jsonl"}, {"path": "a/b"}]}),
    ],
    ids=str,
)  # fmt: skip
def test_fields_that_are_called_otherwise_are_renamed(
    tool: str, change: dict[str, Any], fields: dict[str, Any], rows: Path
) -> None:
    made = translated(rows, {**ALL[tool], **change})
    assert made.unsupported == []
    assert fields.items() <= made.fields.items()


def test_rows_of_llama_factory_by_what_its_columns_and_tags_say(rows: Path) -> None:
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"prompt": "question", "response": "answer", "system": "rules", "history": "history"}
    info = {
        "one": {"hf_hub_url": "a/b", "columns": columns},
        "two": {"hf_hub_url": "c/d", "formatting": "sharegpt", "columns": {"messages": "chat"}, "tags": tags},
        "three": {"hf_hub_url": "e/f", "columns": {"prompt": "body"}},
        "four": {"file_name": "away.jsonl"},
    }
    (rows / "data" / "dataset_info.json").write_text(json.dumps(info))
    made = translated(rows, {**LLAMA, "dataset": "one,two,three,four", "max_samples": None})
    assert made.unsupported == []
    renamed = {"question": "instruction", "answer": "output", "rules": "system"}
    assert made.fields["data.train"] == [
        {"path": "a/b", "format": "alpaca", "columns": renamed},
        {"path": "c/d", "format": "messages", "columns": {"chat": "messages"}},
        {"path": "e/f", "format": "text", "columns": {"body": "text"}},
        {"path": str(rows / "data" / "away.jsonl"), "format": "alpaca"},
    ]
    made = translated(rows, {**LLAMA, "dataset": "four,five"})
    assert [line.key for line in made.unsupported] == ["dataset.four", "dataset.five"]
    assert made.fields["data.train"][1] == {"path": "data/five.json"}


@pytest.mark.parametrize(
    ("dataset", "key", "source"),
    [
        ({"type": "jeopardy"}, "datasets.0.type", {"path": "a/b"}),
        ({"type": {"format": "{input}: {instruction}"}}, "datasets.0.type", {"path": "a/b", "format": "alpaca"}),
        ({"type": "alpaca", "data_files": "x.json"}, "datasets.0.data_files", {"path": "x.json", "format": "alpaca"}),
        ({"path": "x.jsonl", "type": "alpaca", "split": "train[:9%]"}, "datasets.0.split",
         {"path": "x.jsonl", "format": "alpaca"}),
    ],
    ids=str,
)  # fmt: skip
def test_rows_that_qft_reads_otherwise_stay_in_the_recipe(
    dataset: dict[str, Any], key: str, source: dict[str, Any], tmp_path: Path
) -> None:
    made = translated(tmp_path, {**AXOLOTL, "datasets": [{"path": "a/b", **dataset}]})
    assert [line.key for line in made.unsupported] == [key]
    assert made.fields["data.train"] == [source]


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"dataset_mixer": {"a/b": 1.0, "c/d": 0.5}, "dataset_splits": ["train_sft", "test_sft"],
          "evaluation_strategy": "epoch", "dataset_configs": ["x", None]},
         {"data.train": [{"path": "a/b", "split": "train_sft", "name": "x"},
                         {"path": "c/d", "split": "train_sft", "weight": 0.5}],
          "data.eval": [{"path": "a/b", "split": "test_sft", "name": "x"}, {"path": "c/d", "split": "test_sft"}]}),
        ({"dataset_mixture": {"datasets": [{"id": "a/b", "config": "x", "columns": ["messages"], "weight": 0.5}],
                              "test_split_size": 0.1}, "eval_strategy": "epoch"},
         {"data.train": [{"path": "a/b", "name": "x", "weight": 0.5}], "data.eval_fraction": 0.1}),
        ({"dataset_id_or_path": "a/b", "dataset_splits": "train[:9]", "tokenizer_name_or_path": "acme/llama-1b"},
         {"data.train": [{"path": "a/b", "split": "train[:9]"}]}),
        ({"dataset_id_or_path": "rows.json", "chat_template": "{{ messages }}", "preprocessing_num_workers": 3},
         {"data.train": [{"path": "rows.json"}], "data.chat_template": "chat-template.jinja", "data.num_proc": 3}),
    ],
    ids=str,
)  # fmt: skip
def test_scripts_that_are_built_on_trl(change: dict[str, Any], fields: dict[str, Any], tmp_path: Path) -> None:
    made = translated(tmp_path, {**SCRIPT, **change})
    assert made.unsupported == []
    assert fields.items() <= made.fields.items()
    assert set(change) <= {line.key for line in made.lines}
    assert made.templates == ({"chat-template.jinja": "{{ messages }}"} if "chat_template" in change else {})


@pytest.mark.parametrize(
    ("tool", "change"),
    [
        ("Axolotl", {"wandb_project": "mine"}),
        ("Axolotl", {"use_trackio": True}),
        ("TRL", {"report_to": ["wandb", "tensorboard"]}),
        ("LLaMA-Factory", {"report_to": "wandb"}),
    ],
)
def test_a_tracker_that_is_not_installed_is_told_and_left_out(
    tool: str, change: dict[str, Any], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorboard" or None)
    made = translated(rows, {**ALL[tool], **change})
    (line,) = (line for line in made.lines if line.key in change)
    assert line.kind is Kind.DECIDED
    assert "not installed here" in line.text
    assert made.fields.get("train.report_to", []) == (
        ["tensorboard"] if isinstance(change.get("report_to"), list) else []
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    made = translated(rows, {**ALL[tool], **change})
    assert kinds(made)[line.key] in (Kind.SAME, Kind.OTHER_FIELD)
    assert made.fields["train.report_to"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"dataset": {**CHAT, "source": "json", "data_files": "x.jsonl", "split": "train[:50%]"}}, "dataset.split"),
        ({"dataset": {**CHAT, "source": "a/b", "new_system_prompt": "Be brief."}}, "dataset.new_system_prompt"),
        ({"model": {"_component_": "mine.models.builder", "lora_rank": 8}}, "model._component_"),
    ],
    ids=["a part of a file", "a system prompt", "a model of nobody"],
)
def test_what_torchtune_does_and_qft_does_not_is_named(change: dict[str, Any], key: str, tmp_path: Path) -> None:
    assert [line.key for line in translated(tmp_path, {**TUNE, **change}).unsupported] == [key]
