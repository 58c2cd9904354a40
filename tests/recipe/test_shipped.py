"""Every recipe in recipes/ loads, resolves, and tells a reader what it is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from jsonschema import Draft202012Validator

from qft.data.formats import from_messages
from qft.errors import QftError
from qft.plan import make_plan
from qft.recipe import Recipe, json_schema, load
from qft.recipe.source import read
from tests.support.paths import ROOT

FOLDER = ROOT / "recipes"
FILES = sorted(path.relative_to(FOLDER) for path in FOLDER.rglob("*.yaml"))
RECIPES = [path.as_posix() for path in FILES if path.parts[0] != "cluster"]
EXPECTED = {
    "quickstart.yaml",
    "qlora-8b-24gb.yaml",
    "qlora-70b-80gb.yaml",
    "lora-bf16.yaml",
    "int8.yaml",
    "full-finetune-small.yaml",
    "custom/int8_symmetric.yaml",
    "calibrate.yaml",
}


def test_the_promised_recipes_are_there() -> None:
    assert set(RECIPES) >= EXPECTED


@pytest.mark.parametrize("name", RECIPES)
def test_it_loads_and_fits_the_schema(name: str) -> None:
    path = FOLDER / name
    assert isinstance(load(path).recipe, Recipe)
    Draft202012Validator(json_schema()).validate(read(path).values)


@pytest.mark.parametrize("name", RECIPES)
def test_it_opens_with_its_schema_what_it_needs_and_its_command(name: str) -> None:
    lines = (FOLDER / name).read_text().splitlines()
    schema = "../" * name.count("/") + "recipe.schema.json"
    assert lines[0] == f"# yaml-language-server: $schema={schema}"
    head = "\n".join(line for line in lines[: lines.index("")])
    assert "Needs:" in head
    command = "calibrate" if load(FOLDER / name).recipe.calibrate else "train"
    assert f"qft {command} recipes/{name}" in head


def test_the_schema_file_is_the_schema() -> None:
    assert json.loads((FOLDER / "recipe.schema.json").read_text()) == json_schema()


@pytest.mark.parametrize("name", ["int8.yaml", "lora-bf16.yaml", "qlora-70b-80gb.yaml", "qlora-8b-24gb.yaml"])
def test_a_gpu_recipe_resolves_to_a_plan(name: str, tiny_model: Path, chat_file: Path, tmp_path: Path) -> None:
    """With a small model and data in place of the large ones, and the CPU in place of the GPU."""
    stand_ins = {
        "model.path": tiny_model,
        "model.device": "cpu",
        "data.train": chat_file,
        "data.max_length": 500,
        "train.optim": "adamw_8bit",
        "output_dir": tmp_path / "run",
    }
    loaded = load(FOLDER / name, [f"{field}={value}" for field, value in stand_ins.items()])
    wanted = {"int8.yaml": "8bit", "lora-bf16.yaml": "none"}.get(name, "4bit")
    assert make_plan(loaded).model.scheme.name == wanted


@pytest.mark.real
@pytest.mark.parametrize("name", ["quickstart.yaml", "full-finetune-small.yaml", "custom/int8_symmetric.yaml"])
def test_a_cpu_recipe_resolves_to_a_plan(name: str) -> None:
    plan = make_plan(load(FOLDER / name, ["model.device=cpu"]))
    assert plan.model.shape.parameters == 134_515_008
    assert len(plan.data.train) == 300


def make_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_data", FOLDER / "quickstart" / "make_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_quick_start_rows_are_those_of_the_script(tmp_path: Path) -> None:
    make_data().main(tmp_path)
    for file in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / file).read_bytes() == (FOLDER / "quickstart" / file).read_bytes()


def test_no_held_out_name_place_or_item_occurs_in_training() -> None:
    def orders(file: str) -> list[dict[str, str]]:
        lines = (FOLDER / "quickstart" / file).read_text().splitlines()
        return [json.loads(from_messages(json.loads(line)).messages[-1]["content"]) for line in lines]

    train, held_out = orders("train.jsonl"), orders("held_out.jsonl")
    assert (len(train), len(held_out)) == (300, 60)
    known = (FOLDER / "quickstart" / "train.jsonl").read_text().lower()
    for order in held_out:
        for word in (order["name"], order["place"], *order["item"].split()):
            assert f" {word.lower()}" not in known, word
            assert f'"{word.lower()}' not in known, word


def test_a_missing_model_of_a_shipped_recipe_is_told_with_its_exit_code() -> None:
    with pytest.raises(QftError) as caught:
        make_plan(load(FOLDER / "qlora-8b-24gb.yaml", ["model.device=cpu", "train.optim=adamw_8bit"]))
    assert caught.value.exit_code == 3
