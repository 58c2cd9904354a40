"""Configurations as people have them: unfinished, of other trainings, with words where values belong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qft.arrive import Kind, translate
from qft.arrive.written import write_translated
from qft.errors import GateError, RecipeError
from tests.support.arrive import ALL, AXOLOTL, LLAMA, TRL, TUNE, kinds, translated


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("base_model: ${BASE}\noutput_dir: $OUT/x\n", ["1: base_model: ${BASE} is", "2: output_dir: $OUT is"]),
        ('base_model: "{{ model }}"\n', ["{{ model }} is still to be filled in"]),
        ("base_model: {{model}}\n", ["{{model}} is of a template: fill it in first"]),
        ("base_model: a/b\nadapter: lora\nadapter: qlora\n", ["3: adapter: given twice", "TRL read the last"]),
        ("base_model: [a/b]\n", ["names no model", "1: base_model: model.path: Input should be a valid"]),
        ("training_arguments:\n  model_name_or_path: a/b\n", ["training_arguments.model_name_or_path is there"]),
        ("model_name_or_path: a/b\ntemplate: qwen\n", ["names no rows to learn from (dataset)", "qft chat"]),
        ("top.model_name: a\ntrain.stage: b\n", ["training_args.yaml"]),
    ],
    ids=["environment", "a template's value", "a template", "twice", "a list", "sections", "no rows", "a page"],
)  # fmt: skip
def test_what_is_no_training_yet_is_refused_as_a_whole(text: str, told: list[str], tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        translate(tmp_path / "other.yaml")
    assert all(part in str(error.value) for part in told)


def test_a_prompt_has_places_of_its_own(tmp_path: Path) -> None:
    kind = {"format": "It costs ${instruction}. ", "no_input_format": "It costs ${instruction}. "}
    made = translated(tmp_path, {**AXOLOTL, "datasets": [{"path": "a/b", "type": kind}]})
    assert "It costs $" in made.templates["prompt.jinja"]


def test_places_that_stand_for_one_another_end(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        translated(tmp_path, {**TUNE, "a": ["${a}"] * 20, "b": "${c}" * 90, "c": "${b}" * 90})
    assert [line.rpartition(":")[2].split()[0] for line in error.value.problems[:-1]] == ["${a}", "${c}", "${b}"]


def test_a_chat_template_makes_no_template_of_a_configuration(tmp_path: Path) -> None:
    text = "base_model: a/b\nchat_template: {% for m in messages %}{{ m.content }}{% endfor %}\n"
    (tmp_path / "other.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        translate(tmp_path / "other.yaml")
    assert "fill it in" not in str(error.value)


@pytest.mark.parametrize(
    ("tool", "change", "key", "told"),
    [
        ("Axolotl", {"lora_r": "None"}, "lora_r", "write null"),
        ("Axolotl", {"load_in_4bit": "false"}, "load_in_4bit", "write false"),
        ("Axolotl", {"eval_steps": 0.1, "evals_per_epoch": None}, "eval_steps", "a share of all steps"),
        ("TRL", {"save_steps": 0.1}, "save_steps", "a share of all steps"),
        ("TRL", {"beta": 0.1}, "beta", "train on the chosen answers"),
        ("TRL", {"resume_from_checkpoint": "out/checkpoint-9"}, "resume_from_checkpoint", "merge its adapter"),
        ("TRL", {"push_to_hub": True, "hub_model_id": "me/x"}, "push_to_hub", "--push-to-hub me/x"),
        ("Axolotl", {"hub_model_id": "me/x"}, "hub_model_id", "qft export outputs/one --to adapter --push-to-hub me/x"),
        ("Axolotl", {"tokenizer_config": "c/d"}, "tokenizer_config", "save the model with such a tokenizer"),
        ("Axolotl", {"model_config": {"output_router_logits": True}},
         "model_config.output_router_logits", "train.router_aux_loss_coef"),
        ("Axolotl", {"fp8": True}, "fp8", "train.matmul"),
        ("Axolotl", {"sequence_len": 0}, "sequence_len", "'auto' or Input should be greater"),
        ("TRL", {"model_init_kwargs": {"max_memory": {"0": "1GiB"}}}, "model_init_kwargs.max_memory", "remove it"),
        ("TRL", {"dataset_mixer": {"a/b": 1}, "dataset_splits": ["sft"]}, "dataset_mixer", "none of dataset_splits"),
        ("torchtune", {"loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"}}, "loss._component_", "chosen answers"),
        ("torchtune", {"ref_checkpointer": {"_component_": "x.Y"}}, "ref_checkpointer._component_", "another recipe"),
        ("torchtune", {"dataset": {**TUNE["dataset"], "filter_fn": "f"}}, "dataset.filter_fn", "an argument of"),
        ("torchtune", {"resume_from_checkpoint": True}, "resume_from_checkpoint", "merge its adapter"),
        ("torchtune", {"tokenizer": {"prompt_template": {"user": ["Q: ", ""]}}},
         "tokenizer.prompt_template.user", "Jinja"),
    ],
    ids=str,
)  # fmt: skip
def test_the_remedy_is_that_of_the_fault(tool: str, change: dict[str, Any], key: str, told: str, rows: Path) -> None:
    made = translated(rows, {**ALL[tool], **change})
    (line,) = (line for line in made.unsupported if line.key == key)
    assert told in line.text


@pytest.mark.parametrize(
    ("tool", "change", "keys"),
    [
        ("Axolotl", {"lora_model_dir": "", "peft": {"loftq_config": {"loftq_bits": None}}}, ["lora_model_dir", "peft"]),
        ("Axolotl", {"save_steps": 0, "hub_strategy": "end"}, ["save_steps", "hub_strategy"]),
        ("TRL", {"hub_model_id": "a/b", "push_to_hub": False}, ["hub_model_id"]),
        ("LLaMA-Factory", {"visual_inputs": True, "buffer_size": 9}, ["visual_inputs", "buffer_size"]),
        ("LLaMA-Factory", {"gradient_checkpointing": False}, ["gradient_checkpointing"]),
    ],
    ids=str,
)
def test_what_says_nothing_is_left_out(tool: str, change: dict[str, Any], keys: list[str], rows: Path) -> None:
    made = translated(rows, {**ALL[tool], **change})
    assert made.unsupported == []
    assert {kinds(made)[key] for key in keys} == {Kind.NO_EFFECT}


@pytest.mark.parametrize(
    ("tool", "change", "fields"),
    [
        ("Axolotl", {"eval_steps": 0.1, "evals_per_epoch": None, "max_steps": 55}, {"train.eval_steps": 6}),
        ("Axolotl", {"tokenizer_config": AXOLOTL["base_model"], "model_config": {"output_router_logits": False}},
         {"train.router_aux_loss_coef": 0.0}),
        ("Axolotl", {"model_config": {"output_router_logits": True, "router_aux_loss_coef": 0.02}},
         {"train.router_aux_loss_coef": 0.02}),
        ("TRL", {"model_init_kwargs": {"device_map": None, "dtype": "bfloat16"}}, {"model.dtype": "bfloat16"}),
        ("TRL", {"stray": None, "lora_rank": None, "save_steps": 0.5, "max_steps": 10}, {"train.save_steps": 5}),
        ("LLaMA-Factory", {"streaming": True, "max_steps": 9, "max_samples": None}, {"data.streaming": True}),
        ("LLaMA-Factory", {"disable_shuffling": True}, {"train.train_sampling_strategy": "sequential"}),
        ("torchtune", {"dataset": {**TUNE["dataset"], "max_seq_len": 64, "use_clean": True}}, {"data.max_length": 64}),
        ("torchtune", {"save_every_n_steps": 7}, {"train.save_strategy": "steps", "train.save_steps": 7}),
        ("torchtune", {"base": "/m", "root": "${base}/r", "output_dir": "${root}/o"}, {"output_dir": "/m/r/o"}),
        ("torchtune", {"output_dir": "${oc.env:QFT_NOWHERE,/tmp}/o"}, {"output_dir": "/tmp/o"}),
        ("torchtune", {"metric_logger": {"_component_": "torchtune.training.metric_logging.TensorBoardLogger",
                                         "log_dir": "x", "organize_logs": True}}, {"train.report_to": ["tensorboard"]}),
    ],
    ids=str,
)  # fmt: skip
def test_what_has_an_equal_is_translated(tool: str, change: dict[str, Any], fields: dict[str, Any], rows: Path) -> None:
    made = translated(rows, {**ALL[tool], **change})
    assert [line for line in made.unsupported if line.key not in ("stray", "lora_rank")] == []
    assert fields.items() <= made.fields.items()


@pytest.mark.parametrize(
    ("tool", "change"),
    [
        ("Axolotl", {"learning_rate": float("nan")}),
        ("LLaMA-Factory", {"dataset_dir": "x" * 3000}),
        ("torchtune", {"max_steps_per_epoch": 10**30, "epochs": [1]}),
        ("Axolotl", {"batch_size": 8, "micro_batch_size": 0, "gradient_accumulation_steps": None}),
    ],
    ids=["no number", "a long name", "a large number", "a division by none"],
)
def test_what_no_tool_takes_is_a_line_too(tool: str, change: dict[str, Any], rows: Path) -> None:
    made = translated(rows, {**ALL[tool], **change})
    assert change.keys() <= {line.key.partition(".")[0] for line in made.lines}


def test_a_folder_has_no_configurations(tmp_path: Path) -> None:
    made = translated(tmp_path, {**TRL, "dataset_name": "./rows/one", "dataset_config": "large"})
    assert [line.key for line in made.unsupported] == ["dataset_config"]
    assert "name" not in made.fields["data.train"][0]


def test_a_misspelt_key_makes_no_other_tool_of_it(tmp_path: Path) -> None:
    assert translated(tmp_path, {**TRL, "lora_rank": 8}).tool == "TRL"
    assert translated(tmp_path, {**LLAMA, "lora_r": 8}).tool == "LLaMA-Factory"


def test_json_with_tabs_is_read(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps(TRL, indent="\t"))
    assert translate(tmp_path / "other.json").tool == "TRL"


def test_nothing_is_written_that_has_no_rows(tmp_path: Path) -> None:
    made = translated(tmp_path, {**AXOLOTL, "datasets": ["a/b"]})
    with pytest.raises(GateError, match="no rows are left to learn from: no recipe is written"):
        write_translated(tmp_path / "recipe.yaml", made, allow_unsupported=True)
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize("told", [{"bos_token": "<s>"}, {"bos_token": {"content": "<s>"}}, {"bos_token": "<x>"}, None])
def test_tokens_are_compared_with_those_of_a_tokenizer_that_is_here(
    told: dict[str, Any] | None, tmp_path: Path
) -> None:
    if told is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    tokens = {"bos_token": "<s>", "unk_token": "<unk>"}
    found = kinds(translated(tmp_path, {**AXOLOTL, "base_model": str(tmp_path), "special_tokens": tokens}))
    same = told is not None and told["bos_token"] != "<x>"
    differs = told is not None and not same
    assert found["special_tokens.bos_token"] is (Kind.SAME if same else Kind.UNSUPPORTED if differs else Kind.DECIDED)
    assert found["special_tokens.unk_token"] is Kind.DECIDED
