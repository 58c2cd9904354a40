"""Where other tools' rows come from, and what their fields are called: named so in the recipe, never left out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jinja2
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


def test_of_a_folder_a_split_is_what_its_files_are_called_after(tmp_path: Path) -> None:
    """`datasets` tells them by their names; else what is held out would be trained on."""
    for name in ("train-00.jsonl", "train-01.jsonl", "dev.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("{}\n")
    asked = {"dataset_name": str(tmp_path), "dataset_train_split": None, "eval_strategy": "epoch"}
    made = translated(tmp_path, {**TRL, **asked, "dataset_test_split": "validation", "dataset_config": "default"})
    assert made.unsupported == []
    assert made.fields["data.train"] == [{"path": str(tmp_path / f"train-0{i}.jsonl")} for i in range(2)]
    assert made.fields["data.eval"] == [{"path": str(tmp_path / "dev.jsonl")}]
    away = translated(tmp_path, {**TRL, **asked, "dataset_name": "/away/rows", "dataset_test_split": "test"})
    assert away.fields["data.train"] == [{"path": "/away/rows"}]
    assert away.fields["data.eval"] == [{"path": "/away/rows/*test*"}]


@pytest.mark.parametrize(
    ("strategy", "probabilities", "weights"),
    [
        ("interleave_under", None, [0.4, 1.0]),
        ("interleave_over", None, [1.0, 2.5]),
        ("interleave_under", "0.8, 0.2", [1.0, 0.625]),
        ("interleave_over", "0.8, 0.2", [1.6, 1.0]),
        ("interleave_once", None, [None, None]),
        ("concat", None, [None, None]),
    ],
)
def test_data_sets_that_are_interleaved_get_weights_by_their_sizes(
    strategy: str, probabilities: str | None, weights: list[float | None], rows: Path
) -> None:
    sizes = {"many": 10, "few": 4}
    for name, size in sizes.items():
        (rows / "data" / f"{name}.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * size)
    info = {name: {"file_name": f"{name}.jsonl"} for name in sizes}
    (rows / "data" / "dataset_info.json").write_text(json.dumps(info))
    mixed = {"mix_strategy": strategy, "interleave_probs": probabilities, "max_samples": None}
    made = translated(rows, {**LLAMA, "dataset": "many,few", **mixed})
    assert made.unsupported == []
    assert [source.get("weight") for source in made.fields["data.train"]] == weights


def test_sizes_that_are_not_known_make_no_weights(rows: Path) -> None:
    (rows / "data" / "dataset_info.json").write_text(
        json.dumps({"a": {"hf_hub_url": "a/b"}, "b": {"hf_hub_url": "c/d"}})
    )
    made = translated(rows, {**LLAMA, "dataset": "a,b", "max_samples": None, "mix_strategy": "interleave_over"})
    assert [line.key for line in made.unsupported] == ["mix_strategy"]


@pytest.mark.parametrize(
    ("dataset", "template", "kind"),
    [
        ({"type": "sharegpt", "conversation": "chatml"}, "chatml.jinja", Kind.OTHER_FIELD),
        ({"type": "sharegpt"}, None, Kind.DECIDED),
        ({"type": "chat_template", "chat_template": "chatml"}, "chatml.jinja", Kind.OTHER_FIELD),
        ({"type": "chat_template", "chat_template": "llama3"}, None, Kind.OTHER_FIELD),
        ({"type": "alpaca_chat.load_qa"}, "alpaca-concise.jinja", Kind.OTHER_FIELD),
        ({"type": "alpaca_w_system.load_open_orca"}, "open-orca.jinja", Kind.OTHER_FIELD),
    ],
    ids=str,
)
def test_the_chat_template_is_that_of_the_data_set(
    dataset: dict[str, str], template: str | None, kind: Kind, tmp_path: Path
) -> None:
    """And the type's line tells where another prompt was there than what renders the rows here."""
    made = translated(tmp_path, {**AXOLOTL, "datasets": [{"path": "a/b", **dataset}, {"path": "c/d", **dataset}]})
    assert made.unsupported == []
    assert made.fields.get("data.chat_template") == template
    assert kinds(made)["datasets.0.type"] is kind


def test_a_file_that_data_files_names_in_full_is_within_no_hub_data_set(tmp_path: Path) -> None:
    rows = str(tmp_path / "rows.json")
    made = translated(tmp_path, {**AXOLOTL, "datasets": [{"path": rows, "data_files": [rows], "type": "alpaca"}]})
    assert made.fields["data.train"] == [{"path": rows, "format": "alpaca"}]
    dataset = {"_component_": "torchtune.datasets.alpaca_cleaned_dataset", "data_files": rows}
    made = translated(tmp_path, {**TUNE, "dataset": dataset})
    assert made.unsupported == []
    assert made.fields["data.train"] == [{"path": rows, "format": "alpaca"}]


def test_several_data_sets_of_torchtune_are_as_many_sources(tmp_path: Path) -> None:
    one = {"_component_": "torchtune.datasets.instruct_dataset", "source": "a/b", "packed": True}
    made = translated(tmp_path, {**TUNE, "dataset": [one, {**one, "source": "c/d", "split": "train[:9]"}]})
    assert made.unsupported == []
    assert [source["path"] for source in made.fields["data.train"]] == ["a/b", "c/d"]
    assert (made.fields["data.packing"], made.fields["data.loss_on"]) == (True, "assistant")
    assert kinds(made)["dataset.1.source"] is Kind.DECIDED


def test_data_sets_of_torchtune_that_are_rendered_otherwise_are_not_mixed(tmp_path: Path) -> None:
    several = [{"_component_": "torchtune.datasets.alpaca_dataset"}, {"_component_": "torchtune.datasets.chat_dataset"}]
    made = translated(tmp_path, {**TUNE, "dataset": several})
    assert {"dataset", "dataset.1._component_"} <= {line.key for line in made.unsupported}


def test_plain_texts_of_llama_factory(rows: Path) -> None:
    """Its stage pt, whose blocks of texts qft does not cut: a longer one is told instead of dropped or cut off."""
    info = {"one": {"file_name": "one.jsonl", "columns": {"prompt": "text"}}, "two": {"hf_hub_url": "a/b"}}
    (rows / "data" / "dataset_info.json").write_text(json.dumps(info))
    made = translated(rows, {**LLAMA, "stage": "pt", "dataset": "one,two", "max_samples": None})
    assert made.unsupported == []
    assert made.fields["data.train"] == [
        {"path": str(rows / "data" / "one.jsonl"), "format": "text"},
        {"path": "a/b", "format": "text", "columns": {"instruction": "text"}},
    ]
    assert [made.fields[f"data.{name}"] for name in ("loss_on", "packing", "on_too_long")] == ["all", True, "stop"]
    assert "data.chat_template" not in made.fields


def test_a_long_text_of_axolotl_is_not_dropped(tmp_path: Path) -> None:
    made = translated(tmp_path, {**AXOLOTL, "datasets": [{"path": "a/b", "type": "completion"}]})
    assert made.fields["data.on_too_long"] == "stop"


@pytest.mark.parametrize(
    ("tool", "key"),
    [("Axolotl", "dataset_processes"), ("LLaMA-Factory", "preprocessing_num_workers"), ("TRL", "dataset_num_proc")],
)
def test_more_processes_than_a_machine_is_for_are_left_out(tool: str, key: str, rows: Path) -> None:
    made = translated(rows, {**ALL[tool], key: 4096})
    assert kinds(made)[key] is Kind.DECIDED
    assert translated(rows, {**ALL[tool], key: 2}).fields["data.num_proc"] == 2


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("alpaca_chat.load_no_prompt", "USER: Q?\nASSISTANT:A.</s>"),
        ("alpaca_instruct.load_no_prompt", "### Instruction:\nQ?\n\n### Response:\nA.</s>"),
        ("alpaca_w_system.load_open_orca", "### Human:\nQ?\n### Assistant:\nA.</s>"),
        ("alpaca_w_system.load_open_orca_chatml",
         "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\nA.</s>\n"),
        ("alpaca_chat.load_concise",
         "SYSTEM: Below is an instruction from a USER that describes a task. The ASSISTANT writes a response that "
         "appropriately and concisely completes the request.\n\n\nUSER: Q?\nASSISTANT:A.</s>"),
    ],
)  # fmt: skip
def test_prompts_are_those_of_axolotls_prompters(kind: str, expected: str, tmp_path: Path) -> None:
    """Source: axolotl/prompters.py and prompt_strategies/alpaca_{chat,instruct,w_system}.py of 0.18."""
    made = translated(tmp_path, {**AXOLOTL, "datasets": [{"path": "a/b", "type": kind}]})
    (text,) = made.templates.values()
    text = text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    turns = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]
    assert jinja2.Template(text, keep_trailing_newline=True).render(messages=turns, eos_token="</s>") == expected
