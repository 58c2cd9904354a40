"""`qft explain`, and what --set is completed to."""

from __future__ import annotations

import dataclasses
import json

import pytest

from qft.arrive.explain import READERS, completed, explain, field_names
from qft.recipe import Recipe
from tests.support.cli import qft


def test_every_field_is_explained() -> None:
    for name in field_names():
        found = explain(name)
        assert found.meaning or "." not in name, name
        assert found.takes, name
    assert explain("train.optim").takes.startswith("auto, adamw_torch, ")
    assert explain("adapter.lora_dropout").takes == "a number from 0 below 1"
    assert explain("data.train").default == "[]"
    assert explain("data.audit.secrets").default == "warn"
    assert explain("data.train.split").meaning.startswith("Split of a hub dataset")
    assert explain("data").inner[0] == "data.train"
    assert explain("model.path").default == "none: it has to be given"


def test_what_is_said_to_be_read_by_a_library_is_a_field_of_it() -> None:
    """A field of qft's own belongs into OWN."""
    from peft import LoraConfig
    from transformers import TrainingArguments

    libraries = {"train": TrainingArguments, "adapter": LoraConfig}
    for section, library in libraries.items():
        theirs = {field.name for field in dataclasses.fields(library)}
        section_class = Recipe.model_fields[section].annotation
        assert section_class is not None
        for name in section_class.model_fields:
            if explain(f"{section}.{name}").reader == READERS[section]:
                assert name in theirs, f"{section}.{name}"


def test_other_tools_names() -> None:
    assert explain("data.max_length").peers == {
        "torchtune": ("tokenizer.max_seq_len", "dataset.max_seq_len"),
        "Axolotl": ("sequence_len",),
        "LLaMA-Factory": ("cutoff_len",),
        "TRL": ("max_length", "max_seq_length"),
    }
    assert explain("quant.mode").peers["Axolotl"] == ("load_in_4bit", "load_in_8bit")


def test_the_command() -> None:
    shown = qft("explain", "train.warmup_steps")
    assert shown.exit_code == 0
    assert "transformers.TrainingArguments" in shown.stdout
    assert json.loads(qft("explain", "adapter.r", "--json").stdout)["default"] == "16"


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("train.lerning_rate", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("sequence_len", "data.max_length"),
        ("micro_batch_size", "train.per_device_train_batch_size"),
        ("lora_target", "adapter.target_modules"),
        ("TRAIN.LEARNING_RATE", "train.learning_rate"),
    ],
)
def test_what_is_no_field_is_told_with_what_is_meant(word: str, meant: str) -> None:
    found = qft("explain", word)
    assert found.exit_code == 2
    assert f"meant is perhaps {meant}" in found.stderr


@pytest.mark.parametrize(
    ("begun", "ends"),
    [
        ("tr", ["train."]),
        ("train.lea", ["train.learning_rate"]),
        ("output", ["output_dir"]),
        ("train.fp16=", ["train.fp16=true", "train.fp16=false"]),
        ("quant.mode=q", ["quant.mode=qat"]),
        ("data.au", ["data.audit."]),
        ("data.audit.sec", ["data.audit.secrets"]),
        ("data.audit.secrets=o", ["data.audit.secrets=off"]),
        ("data.tra", ["data.train", "data.train_on_eos"]),
        ("train.nothing", []),
        ("train.nothing=", []),
    ],
)
def test_completion(begun: str, ends: list[str]) -> None:
    assert list(completed(begun)) == ends


def test_the_shell_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the script asks that `qft --install-completion` puts into ~/.bashrc."""
    monkeypatch.setenv("_QFT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "qft train recipe.yaml --set train.lea")
    monkeypatch.setenv("COMP_CWORD", "4")
    from typer.testing import CliRunner

    from qft.cli import app

    assert CliRunner().invoke(app, [], prog_name="qft").stdout.split() == ["train.learning_rate"]
