"""TRL's keys, all of them; and rows with images, of LLaMA-Factory."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from qft.arrive import TOOLS, Kind
from qft.data.formats import FORMATS
from qft.plan.modules import match_adapter
from qft.recipe.training import AdapterSection
from tests.support.arrive import LLAMA, TRL, kinds, translated
from tests.support.tiny import tiny_skeleton


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"loss_type": "dft"}, "loss_type"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "dataset_kwargs.skip_prepare_dataset"),
        ({"datasets": [{"path": "a/b", "fraction": 0.5}, {"path": "c/d", "fraction": 0.5}]}, "datasets.0"),
        ({"activation_checkpointing_kwargs": {"every_n_layers": 2}}, "activation_checkpointing_kwargs.every_n_layers"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
    ],
    ids=str,
)
def test_what_trl_does_and_qft_does_not_is_named(change: dict[str, Any], key: str, tmp_path: Path) -> None:
    assert key in [line.key for line in translated(tmp_path, {**TRL, **change}).unsupported]


def test_trl_reads_no_dataset_name_beside_datasets(tmp_path: Path) -> None:
    made = translated(tmp_path, {**TRL, "datasets": [{"path": "a/b"}]})
    assert kinds(made)["dataset_name"] is Kind.NO_EFFECT
    assert made.unsupported == []
    assert made.fields["data.train"] == [{"path": "a/b"}]


TRL_FIELDS = """
    learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef chat_template_path dataset_text_field
    dataset_kwargs dataset_num_proc eos_token max_length truncation_mode shuffle_dataset packing packing_strategy
    padding_free pad_to_multiple_of eval_packing completion_only_loss assistant_only_loss loss_type
    activation_offloading pad_token logging_steps gradient_checkpointing bf16 lr_scheduler_kwargs use_liger_kernel
    torch_empty_cache_steps model_name_or_path model_revision dtype attn_implementation use_peft lora_r lora_alpha
    lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora
    load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage dataset_name
    dataset_config dataset_train_split dataset_test_split dataset_streaming ignore_bias_buffers datasets streaming
    test_split_size
"""
"""Of SFTConfig, ModelConfig, ScriptArguments and DatasetMixtureConfig of trl 1.16."""


def test_each_field_of_trl_and_of_the_trainer_has_a_rule() -> None:
    found = importlib.util.find_spec("transformers")
    assert found is not None
    assert found.origin is not None
    source = (Path(found.origin).parent / "training_args.py").read_text("utf-8")
    (arguments,) = (part for part in ast.parse(source).body if getattr(part, "name", "") == "TrainingArguments")
    assert isinstance(arguments, ast.ClassDef)
    fields = [part.target.id for part in arguments.body if isinstance(part, ast.AnnAssign)
              and isinstance(part.target, ast.Name)]  # fmt: skip
    known = [name for name in fields if not name.startswith("_")]
    assert len(known) > 90
    assert {*known, *TRL_FIELDS.split()} - TOOLS["TRL"].table.keys() == set()


@pytest.mark.parametrize(
    ("entry", "row"),
    [
        ({"formatting": "sharegpt", "columns": {"messages": "messages", "images": "images"},
          "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}},
         {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}],
          "images": ["cat.png"]}),
        ({"formatting": "sharegpt", "columns": {"messages": "conversations", "images": "images"}},
         {"conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}],
          "images": ["cat.png"]}),
        ({"columns": {"prompt": "instruction", "query": "input", "response": "output", "images": "images"}},
         {"instruction": "<image>What?", "input": "", "output": "A cat.", "images": ["cat.png"]}),
    ],
    ids=["messages", "sharegpt", "alpaca"],
)  # fmt: skip
def test_rows_with_images_of_llama_factory_are_read(entry: dict[str, Any], row: dict[str, Any], rows: Path) -> None:
    """By the format that is written, the image stands where the row's text says."""
    (rows / "data" / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.jsonl", **entry}}))
    made = translated(rows, {**LLAMA, "image_max_pixels": 262144, "media_dir": "data", "freeze_vision_tower": True})
    assert made.unsupported == []
    (source,) = made.fields["data.train"]
    (line,) = (line for line in made.lines if line.key == "dataset.mine")
    assert "images are sized by the model's own processor" in line.text
    parts = FORMATS[source["format"]](row).messages[0]["content"]
    assert [part["type"] for part in parts] == ["image", "text"]


@pytest.mark.parametrize(("family", "count"), [("llama", 4), ("gpt2", 2), ("phi3", 2)])
def test_what_peft_chooses_without_target_modules_is_in_the_model(family: str, count: int, tmp_path: Path) -> None:
    pattern = translated(tmp_path, TRL).fields["adapter.target_modules"]
    matched, problems = match_adapter(AdapterSection(target_modules=pattern), tiny_skeleton(family))
    assert (matched, problems) == ({"adapter.target_modules": {pattern: count}}, [])
