"""quant.skip_modules auto: the layers that quantizing harms most stay in 16 bits, within a budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qft.calibration.skip_auto import choose_skip_modules
from qft.commands.evaluate import EvalOptions, evaluate
from qft.commands.train import train
from qft.documents.skipped import SkippedModules
from qft.documents.training import Report
from qft.errors import QftError, RecipeError, RunError
from qft.model.load import load_base
from qft.plan import make_plan
from qft.progress import View
from qft.recipe import load
from tests.support.models import byte_tokenizer, tiny_llama
from tests.support.runs import HARD

RecipeFile = Callable[..., Path]
WORST = "model.layers.1.mlp.down_proj"
WEIGHTS = 64 * 128
"""Of that layer."""


@pytest.fixture
def model(tmp_path: Path) -> str:
    """The tiny model, one layer of which lies in the widest gap of nf4, between -1 and -0.696 of the largest weight."""
    made = tiny_llama()
    with torch.no_grad():
        weight = made.get_submodule(WORST).weight
        weight.copy_(torch.where(torch.rand(weight.shape) < 0.1, -0.04, -0.04 * 0.848))
    made.save_pretrained(tmp_path / "outliers")
    byte_tokenizer().save_pretrained(tmp_path / "outliers")
    return str(tmp_path / "outliers")


@pytest.fixture
def recipe(recipe_file: RecipeFile, model: str) -> RecipeFile:
    def write(name: str = "recipe.yaml", **quant: Any) -> Path:
        own = {"preset": "finetune", "skip_modules": "auto", **quant}
        steps = HARD | {"report_to": [], "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        return recipe_file(name, model={"path": model}, quant=own, train=steps)

    return write


def trained(path: Path, **arguments: Any) -> Report:
    return train(load(path), View(), **arguments)


def test_the_worst_layers_are_left_and_that_brings_the_model_closer(recipe: RecipeFile, tmp_path: Path) -> None:
    report = trained(recipe(skip_budget_bytes=WEIGHTS * 2))
    skipped = report.skipped_modules
    assert skipped is not None
    assert skipped.names[0] == WORST
    assert skipped.kl_after < skipped.kl_before
    assert skipped.linear_bytes_before < skipped.linear_bytes_after <= skipped.linear_bytes_before + WEIGHTS * 2
    assert not list(tmp_path.glob(".skip-modules-*"))

    resolved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert resolved["quant"]["skip_modules"] == skipped.names
    assert "skip_budget_bytes" not in resolved["quant"]
    held = load_base(make_plan(load(tmp_path / "run" / "recipe.yaml")).model)
    assert type(held.get_submodule(WORST)) is torch.nn.Linear
    assert type(held.get_submodule("model.layers.0.mlp.down_proj")) is not torch.nn.Linear
    assert evaluate([str(tmp_path / "run")], EvalOptions(data=str(tmp_path / "chats.jsonl")), View()).targets


def test_a_budget_in_bits_is_one_in_bytes(recipe: RecipeFile) -> None:
    plan = make_plan(load(recipe(skip_budget_bits=1.0)))
    bits = WEIGHTS * 16 / plan.model.shape.linear_parameters
    skipped = chosen(recipe(skip_budget_bits=bits))
    assert skipped.budget_bytes == WEIGHTS * 2
    assert skipped.names[0] == WORST


def test_int8_is_measured_as_int8(recipe: RecipeFile) -> None:
    skipped = chosen(recipe(preset=..., mode="8bit", skip_budget_bytes=WEIGHTS))
    assert skipped.kl_after <= skipped.kl_before < 0.01


def chosen(path: Path) -> SkippedModules:
    plan = make_plan(load(path))
    Path(plan.recipe.output_dir).mkdir(exist_ok=True)
    return choose_skip_modules(plan, View())


def test_scales_are_measured_as_they_are_held(recipe: RecipeFile) -> None:
    shapes = [m.weight.shape for m in tiny_llama().model.modules() if isinstance(m, torch.nn.Linear)]
    measured, expected = [], []
    for double_quant in (False, True):
        path = recipe(double_quant=double_quant, skip_budget_bytes=WEIGHTS)
        measured.append(chosen(path))
        scheme = make_plan(load(path)).model.scheme
        expected.append(sum(scheme.weight_bytes(*shape) or 0 for shape in shapes))
    description = 200  # bytes of JSON at most, of each layer
    for skipped, held in zip(measured, expected, strict=True):
        assert held < skipped.linear_bytes_before < held + len(shapes) * description
    assert abs(expected[1] - expected[0]) > 0.05 * expected[0]
    assert measured[0].kl_before != measured[1].kl_before


def test_outliers_are_measured_from_the_threshold_on(recipe: RecipeFile) -> None:
    held = ({"preset": ..., "mode": "8bit", "threshold": threshold} for threshold in (0.25, 6.0))
    low, usual = (chosen(recipe(**quant, skip_budget_bytes=WEIGHTS)) for quant in held)
    assert low.linear_bytes_before == usual.linear_bytes_before
    assert low.kl_before < usual.kl_before  # what is multiplied in 16 bits loses less


def test_a_resumed_run_keeps_its_choice(recipe: RecipeFile, tmp_path: Path) -> None:
    class Stop(View):
        def step(self, step: Any) -> None:
            if step.step == 3:
                raise KeyboardInterrupt

    path = recipe(skip_budget_bytes=WEIGHTS * 2)
    with pytest.raises(KeyboardInterrupt):
        train(load(path), Stop())
    chosen = json.loads((tmp_path / "run" / "manifest.json").read_text())["skipped_modules"]
    with pytest.raises(RunError, match=rf"\d+: quant.skip_budget_bytes: .* was started with {WEIGHTS * 2:,} bytes"):
        trained(recipe(skip_budget_bytes=WEIGHTS), resume=True)
    report = trained(recipe(skip_budget_bytes=WEIGHTS * 2), resume=True)
    assert report.skipped_modules is not None
    assert report.skipped_modules.model_dump() == chosen


@pytest.mark.parametrize(
    ("quant", "text"),
    [
        ({}, "auto needs one budget"),
        ({"skip_budget_bits": 1.0, "skip_budget_bytes": 5}, "auto needs one budget"),
        ({"skip_modules": ["up_proj"], "skip_budget_bits": 1.0}, "is read only with quant.skip_modules auto"),
    ],
)
def test_a_budget_belongs_to_auto(quant: dict[str, Any], text: str, recipe: RecipeFile) -> None:
    with pytest.raises(RecipeError, match=text):
        load(recipe(**quant))


def test_a_recipe_whose_layers_are_not_chosen_yet_is_no_target(recipe: RecipeFile) -> None:
    with pytest.raises(QftError, match=r"decided by `qft train`"):
        evaluate([str(recipe(skip_budget_bits=1.0))], EvalOptions(), View())
