"""Configurations of other tools, in their shapes: every key has a line, and the recipe is what their tool would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qft.arrive import TOOLS, Kind, translate
from qft.arrive.written import recipe_text, write_translated
from qft.errors import GateError, RecipeError
from qft.recipe import load
from tests.support.arrive import ALL, AXOLOTL, LLAMA, TRL, TUNE, kinds, translated
from tests.support.cli import qft


def test_axolotl(tmp_path: Path) -> None:
    made = translated(tmp_path, AXOLOTL)
    assert made.tool == "Axolotl"
    assert made.fields == {
        "model.path": "acme/llama-1b", "quant.mode": "4bit", "quant.quant_type": "nf4", "quant.double_quant": True,
        "adapter.kind": "lora", "adapter.r": 32, "adapter.lora_alpha": 16, "adapter.lora_dropout": 0.05,
        "adapter.target_modules": "all-linear", "data.eval_fraction": 0.1, "data.max_length": 2048,
        "data.packing": True,
        "data.train": [{"path": "acme/rows", "format": "alpaca", "split": "train[:20%]"}],
        "data.chat_template": "alpaca.jinja", "train.eval_strategy": "epoch", "train.save_strategy": "epoch",
        "train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 4, "train.num_train_epochs": 3,
        "train.optim": "adamw_8bit", "train.lr_scheduler_type": "cosine", "train.learning_rate": 2e-4,
        "train.bf16": "auto", "train.tf32": False, "train.gradient_checkpointing": True, "train.warmup_steps": 0.1,
        "train.weight_decay": 0.0, "output_dir": "outputs/one", "data.on_too_long": "skip",
        "train.per_device_eval_batch_size": 2, "train.save_total_limit": 4, "seed": 42,
    }  # fmt: skip
    found = kinds(made)
    assert found["micro_batch_size"] is Kind.OTHER_FIELD
    assert found["gradient_accumulation_steps"] is Kind.SAME
    assert found["sample_packing"] is Kind.OTHER_FIELD
    assert found["attn_implementation"] is Kind.DECIDED
    assert found["lora_target_modules"] is Kind.NO_EFFECT
    assert found["excess_length_strategy"] is Kind.DEFAULT
    assert made.unsupported == []


def test_llama_factory(rows: Path) -> None:
    made = translated(rows, LLAMA)
    assert made.tool == "LLaMA-Factory"
    assert made.fields == {
        "model.path": "acme/llama-1b", "adapter.kind": "lora", "adapter.target_modules": ["q_proj", "v_proj"],
        "quant.mode": "4bit", "quant.quant_type": "nf4", "quant.double_quant": False,
        "data.train": [{"path": str(rows / "data" / "mine.jsonl"), "format": "alpaca", "weight": 0.5}],
        "data.chat_template": "default.jinja", "data.max_length": 512, "output_dir": "saves/one",
        "train.report_to": [], "train.per_device_train_batch_size": 1, "train.num_train_epochs": 3.0,
        "train.learning_rate": 1e-4, "train.warmup_steps": 0.1, "train.bf16": True, "adapter.r": 8,
        "adapter.lora_alpha": 16, "data.on_too_long": "truncate", "train.gradient_checkpointing": True,
        "train.gradient_accumulation_steps": 1, "train.optim": "adamw_torch_fused", "train.save_strategy": "steps",
        "train.save_total_limit": None, "seed": 42,
    }  # fmt: skip
    assert made.unsupported == []


def test_trl(tmp_path: Path) -> None:
    made = translated(tmp_path, TRL)
    assert made.tool == "TRL"
    assert made.unsupported == []
    expected = {
        "adapter.kind": "lora", "adapter.r": 8, "adapter.lora_alpha": 32, "adapter.lora_dropout": 0.05,
        "quant.mode": "4bit", "quant.double_quant": False, "model.dtype": "float32", "train.bf16": True,
        "data.train": [{"path": "acme/rows", "split": "train_sft"}], "data.loss_on": "all", "data.max_length": 1024,
        "data.on_too_long": "truncate", "train.learning_rate": 2e-5, "train.per_device_train_batch_size": 8,
        "train.num_train_epochs": 3, "train.warmup_steps": 0, "train.gradient_checkpointing": True,
    }  # fmt: skip
    assert expected.items() <= made.fields.items()


def test_torchtune(tmp_path: Path) -> None:
    made = translated(tmp_path, TUNE)
    assert made.tool == "torchtune"
    assert made.unsupported == []
    expected = {
        "model.path": "/tmp/m/", "model.dtype": "bfloat16", "quant.mode": "4bit", "adapter.r": 8,
        "adapter.target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "data.train": [{"path": "yahma/alpaca-cleaned", "format": "alpaca"}], "data.loss_on": "all",
        "data.chat_template": "alpaca.jinja", "train.learning_rate": 3e-4, "train.max_grad_norm": 0,
        "train.lr_scheduler_type": "cosine", "train.warmup_steps": 100, "train.optim": "adamw_torch_fused",
    }  # fmt: skip
    assert expected.items() <= made.fields.items()


@pytest.mark.parametrize("tool", ALL)
def test_every_key_has_a_line_and_the_recipe_loads(tool: str, rows: Path) -> None:
    made = translated(rows, ALL[tool])
    told = {line.key for line in made.lines} | {line.key.partition(".")[0] for line in made.lines}
    assert made.config.values.keys() <= told
    recipe = rows / "recipe.yaml"
    write_translated(recipe, made)
    loaded = load(recipe).recipe
    for name, value in made.fields.items():
        section, _, inner = name.partition(".")
        if inner and not isinstance(value, list) and "path" not in name and "chat_template" not in name:
            assert getattr(getattr(loaded, section), inner) == value, name
    head = recipe.read_text().partition("\nmodel:")[0]
    assert all(f"#   {line.key}" in head for line in made.lines)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("value", [True, 0.5, "words", ["one", 2], {"one": [None]}, -1], ids=repr)
def test_any_value_of_any_key_becomes_a_valid_recipe_or_a_line(tool: str, value: Any, rows: Path) -> None:
    """One key after another, beside the rest of a configuration."""
    flat = {key: value for key in TOOLS[tool].table if "." not in key}
    for part in range(0, len(flat), 60):
        changed = dict(list(flat.items())[part : part + 60])
        try:
            made = translated(rows, {**ALL[tool], **changed})
        except RecipeError as error:
            assert "names no model" in str(error) or "no configuration of" in str(error)  # noqa: PT017
            continue
        assert set(changed) <= {line.key.partition(".")[0] for line in made.lines}
        recipe = rows / f"{part}.yaml"
        recipe.write_text(recipe_text(made, recipe))
        if not any(line.key == "(the whole)" for line in made.lines):
            load(recipe)


@pytest.mark.parametrize("key", ["lora_target_linears", "micro_batchsize"])
def test_a_key_that_axolotl_silently_ignores_is_told_with_what_is_meant(key: str, tmp_path: Path) -> None:
    made = translated(tmp_path, {**AXOLOTL, key: 8})
    (line,) = (line for line in made.lines if line.key == key)
    assert line.kind is Kind.NO_EFFECT
    assert "says nothing" in line.text or "no longer" in line.text
    if key == "micro_batchsize":
        assert line.text.endswith("meant is perhaps micro_batch_size")


def test_lora_in_axolotl_does_not_quantize_to_4_bits(tmp_path: Path) -> None:
    """BitsAndBytesConfig is made for adapter qlora with load_in_4bit and lora with load_in_8bit alone."""
    made = translated(tmp_path, {**AXOLOTL, "adapter": "lora"})
    assert "quant.mode" not in made.fields
    assert kinds(made)["load_in_4bit"] is Kind.NO_EFFECT


@pytest.mark.parametrize(
    ("tool", "change", "fields"),
    [
        ("Axolotl", {"load_in_4bit": False, "load_in_8bit": True, "adapter": "lora"}, {"quant.mode": "8bit"}),
        ("Axolotl", {"train_on_inputs": True}, {"data.loss_on": "all"}),
        ("Axolotl", {"excess_length_strategy": "raise"}, {"data.on_too_long": "stop"}),
        ("Axolotl", {"bf16": False}, {"train.bf16": False, "model.dtype": "float32"}),
        ("Axolotl", {"gradient_checkpointing": "offload"}, {"memory.checkpoints": "host"}),
        ("Axolotl", {"datasets": [{"path": "json", "data_files": "a.jsonl", "type": "chat_template"}]},
         {"data.train": [{"path": "a.jsonl", "format": "messages"}]}),
        ("Axolotl", {"datasets": [{"path": "a/b", "type": "chat_template", "field_messages": "conversations",
                                   "message_property_mappings": {"role": "from", "content": "value"}}]},
         {"data.train": [{"path": "a/b", "format": "sharegpt"}]}),
        ("Axolotl", {"datasets": [{"path": "a/b", "type": "chat_template", "train_on_eos": "last"}]},
         {"data.train_on_eos": "last"}),
        ("Axolotl", {"adapter": None, "load_in_4bit": None}, {"adapter.kind": "none"}),
        ("Axolotl", {"tokens": ["<a>"]}, {"model.add_tokens": ["<a>"]}),
        ("Axolotl", {"evals_per_epoch": None, "eval_strategy": False}, {"data.eval_fraction": 0.1}),
        ("LLaMA-Factory", {"eval_strategy": False, "add_tokens": "<a>, <b>"}, {"model.add_tokens": ["<a>", "<b>"]}),
        ("LLaMA-Factory", {"lora_target": "all"}, {"adapter.target_modules": "all-linear"}),
        ("LLaMA-Factory", {"lora_rank": 16}, {"adapter.lora_alpha": 32}),
        ("LLaMA-Factory", {"mask_history": True, "train_on_prompt": False}, {"data.loss_on": "last_assistant"}),
        ("LLaMA-Factory", {"eval_strategy": "steps", "val_size": 0.1}, {"train.eval_steps": 500}),
        ("TRL", {"eval_strategy": "steps"}, {"train.eval_steps": 10}),
        ("TRL", {"eval_strategy": "steps", "logging_steps": 7}, {"train.eval_steps": 7}),
        ("LLaMA-Factory", {"pissa_init": True, "quantization_bit": None, "pissa_iter": 4},
         {"adapter.init_lora_weights": "pissa_niter_4"}),
        ("TRL", {"use_peft": False, "load_in_4bit": False}, {"adapter.kind": "none"}),
        ("TRL", {"lora_target_modules": "all-linear"}, {"adapter.target_modules": "all-linear"}),
        ("TRL", {"eval_strategy": "epoch"}, {"data.eval": [{"path": "acme/rows", "split": "test"}]}),
        ("TRL", {"max_length": None}, {"data.max_length": "auto", "data.on_too_long": "stop"}),
        ("TRL", {"datasets": [{"path": "a/b", "name": "c"}, {"path": "d/e", "split": "train[:9]"}]},
         {"data.train": [{"path": "a/b", "name": "c"}, {"path": "d/e", "split": "train[:9]"}]}),
        ("TRL", {"test_split_size": 0.1}, {"data.eval_fraction": 0.1}),
        ("TRL", {"activation_checkpointing": False}, {"train.gradient_checkpointing": False}),
        ("TRL", {"activation_checkpointing_kwargs": {"offload": True}}, {"memory.checkpoints": "host"}),
        ("TRL", {"optim": "adamw_torch_8bit", "loss_type": "chunked_nll"}, {"train.optim": "adamw_8bit"}),
        ("TRL", {"lora_target_parameters": ["mlp.experts.gate_up_proj"]}, {"adapter.target_experts": True}),
        ("TRL", {"load_in_4bit": False, "load_in_8bit": True}, {"quant.mode": "8bit"}),
        ("TRL", {"completion_only_loss": True, "packing": True, "packing_strategy": "bfd"},
         {"data.loss_on": "assistant", "data.packing": True}),
        ("torchtune", {"max_steps_per_epoch": 50, "epochs": 2}, {"train.max_steps": 100}),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_key_becomes(tool: str, change: dict[str, Any], fields: dict[str, Any], rows: Path) -> None:
    made = translated(rows, {**ALL[tool], **change})
    assert made.unsupported == []
    assert fields.items() <= made.fields.items()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"optimizer": "muon"}, "optimizer"),
        ({"lr_scheduler": "rex"}, "lr_scheduler"),
        ({"val_set_size": 100}, "val_set_size"),
        ({"context_parallel_size": 2}, "context_parallel_size"),
        ({"special_tokens": {"eos_token": "<|im_end|>"}}, "special_tokens.eos_token"),
        ({"datasets": [{"path": "a/b", "type": "jeopardy"}]}, "datasets.0.type"),
        ({"loraplus_lr_ratio": 16}, "loraplus_lr_ratio"),
        (
            {
                "datasets": [
                    {"path": "a/b", "type": "chat_template", "train_on_eos": "all"},
                    {"path": "c/d", "type": "chat_template"},
                ]
            },
            "datasets.0.train_on_eos",
        ),
        ({"torch_compile": True}, "torch_compile"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named_with_its_line(change: dict[str, Any], key: str, tmp_path: Path) -> None:
    made = translated(tmp_path, {**AXOLOTL, **change})
    assert key in [line.key for line in made.unsupported]
    with pytest.raises(GateError, match=rf"other.yaml:\d+: {key}: not supported: .*"):
        write_translated(tmp_path / "recipe.yaml", made)
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_chat_template_that_is_text_becomes_a_file(tmp_path: Path) -> None:
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = [{"path": "a/b", "type": "chat_template"}]
    made = translated(tmp_path, {**AXOLOTL, "chat_template": "jinja", "chat_template_jinja": text, "datasets": rows})
    write_translated(tmp_path / "recipe.yaml", made)
    named = load(tmp_path / "recipe.yaml").recipe.data.chat_template
    assert named is not None
    assert Path(named).read_text() == text


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.yaml").write_text(yaml.safe_dump({**AXOLOTL, "optimizer": "muon"}))
    refused = qft("init", "recipes/mine.yaml", "--from", "other.yaml")
    assert (refused.exit_code, Path("recipes/mine.yaml").exists()) == (4, False)
    assert "optimizer: not supported" in refused.stderr
    made = qft("init", "recipes/mine.yaml", "--from", "other.yaml", "--allow-unsupported")
    assert made.exit_code == 0
    assert "Axolotl: not supported" in made.stdout
    loaded = load(Path("recipes/mine.yaml")).recipe
    assert loaded.output_dir == str(tmp_path / "outputs" / "one")
    assert loaded.data.chat_template == str(tmp_path / "recipes" / "alpaca.jinja")
    again = qft("init", "recipes/mine.yaml", "--from", "other.yaml", "--allow-unsupported")
    assert "not overwritten" in again.stderr
    assert qft("init", "x.yaml").exit_code == 2
    assert qft("init", "x.yaml", "--from", "other.yaml", "--model", "a/b").exit_code == 2


def test_a_recipe_of_nobody_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no configuration of torchtune, Axolotl, LLaMA-Factory, TRL"):
        translated(tmp_path, {"model": "a/b"})
    (tmp_path / "train.py").write_text("from unsloth import FastLanguageModel\n")
    with pytest.raises(RecipeError, match=r"train\.py: code is not read: write the arguments of its SFTConfig"):
        translate(tmp_path / "train.py")
