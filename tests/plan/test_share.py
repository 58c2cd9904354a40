"""The share of the weights that is really held in few bits: stated, and refused where a scheme holds little."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qft.commands.calibrate import calibrate
from qft.commands.train import train
from qft.errors import RecipeError
from qft.model.load import load_base
from qft.plan import make_plan, plan_calibration
from qft.progress import View
from qft.quant.share import measured_share
from qft.recipe import load
from qft.recipe.load import dump
from tests.support.cli import qft
from tests.support.models import byte_tokenizer

RecipeFile = Callable[..., Path]
Models = Callable[[str], Path]

FOUR = {"preset": "finetune"}
EIGHT = {"preset": None, "mode": "8bit"}
ALLOWED = {"allow_partial": True}
EXPERTS, ROUTER, ATTENTION = 4 * 3 * 64 * 128, 4 * 64, 2 * 64 * 64 + 2 * 64 * 32
"""Weights of a block of the Mixtral."""
MIXTRAL = ATTENTION / (EXPERTS + ROUTER + ATTENTION)
WHOLE = (ATTENTION + EXPERTS) / (EXPERTS + ROUTER + ATTENTION)


def refusal(path: Path, plan: Callable[..., Any] = make_plan) -> str:
    with pytest.raises(RecipeError) as caught:
        plan(load(path))
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "share", "quant"),
    [
        *[("llama", 1, FOUR), ("llama", 1, EIGHT), ("mixtral", WHOLE, FOUR), ("mixtral", WHOLE, EIGHT)],
        *[("falcon", 0, FOUR), ("falcon", 0, EIGHT), ("gpt2", 1, FOUR), ("gpt2", 1, EIGHT)],
        *[("gpt_neox", 1, FOUR), ("phi", 1, EIGHT), ("bloom", 1, FOUR)],
    ],
)
def test_the_share_of_the_plan_is_that_of_the_loaded_model(
    kind: str, share: float, quant: dict[str, Any], models: Models, recipe_file: RecipeFile
) -> None:
    allowed = ALLOWED if share < 0.9 else {}
    plan = make_plan(load(recipe_file(model={"path": str(models(kind))}, quant=quant | allowed)))
    assert plan.document().quantization.quantized_share == pytest.approx(share)
    assert measured_share(load_base(plan.model)) == pytest.approx(share)


@pytest.mark.parametrize(("quant", "line"), [(FOUR, "preset"), (EIGHT, "mode")])
def test_a_base_that_is_quantized_in_name_alone_is_refused(
    quant: dict[str, Any], line: str, models: Models, recipe_file: RecipeFile
) -> None:
    path = recipe_file(model={"path": str(models("falcon"))}, quant=quant)
    number = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if text.strip().startswith(f"{line}:"))
    told = refusal(path)
    assert told.startswith(f"{path}:{number}: quant.mode: 0.0% of the weights outside embeddings and head")
    assert "transformer.h.0." in told
    assert "quant.allow_partial" in told


def test_check_tells_the_share(models: Models, recipe_file: RecipeFile) -> None:
    path = recipe_file(model={"path": str(models("falcon"))}, quant=FOUR)
    assert qft("check", path).exit_code == 2
    path = recipe_file(model={"path": str(models("falcon"))}, quant=FOUR | ALLOWED)
    assert "0.0% of the weights outside embeddings and head" in qft("check", path).output
    told = json.loads(qft("check", path, "--json").stdout)
    assert told["quantization"]["quantized_share"] == 0


def test_what_is_left_by_request_needs_no_leave(models: Models, recipe_file: RecipeFile) -> None:
    skipping = FOUR | {"skip_modules": ["experts", "gate"]}
    plan = make_plan(load(recipe_file(model={"path": str(models("mixtral"))}, quant=skipping)))
    assert plan.document().quantization.quantized_share == pytest.approx(MIXTRAL)
    plan = make_plan(load(recipe_file(quant=FOUR | {"skip_modules": ["up_proj", "down_proj", "gate_proj"]})))
    assert plan.document().quantization.quantized_share == pytest.approx(12288 / (12288 + 24576))


def test_leave_that_nothing_needs_is_refused(recipe_file: RecipeFile) -> None:
    assert "quant.allow_partial: nothing is quantized" in refusal(recipe_file(quant=ALLOWED | {"preset": ...}))


def test_a_checkpoint_that_comes_quantized_is_told_apart_too(
    models: Models, tmp_path: Path, recipe_file: RecipeFile
) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(
        models("mixtral"), quantization_config=config, device_map="cpu"
    ).save_pretrained(tmp_path / "nf4")
    byte_tokenizer().save_pretrained(tmp_path / "nf4")
    path = recipe_file(model={"path": str(tmp_path / "nf4")}, quant=None)
    assert "model.path: 11.1% of the weights" in refusal(path)
    loaded = load(recipe_file(model={"path": str(tmp_path / "nf4")}, quant=ALLOWED | {"preset": ...}))
    assert make_plan(loaded).document().quantization.quantized_share == pytest.approx(MIXTRAL)
    (tmp_path / "again.yaml").write_text(dump(loaded.recipe))
    assert make_plan(load(tmp_path / "again.yaml")).recipe == make_plan(loaded).recipe


def test_the_report_tells_what_the_loaded_base_holds(models: Models, recipe_file: RecipeFile) -> None:
    changes = {"adapter": {"target_modules": ["query_key_value"]}, "train": {"max_steps": 1, "report_to": []}}
    path = recipe_file(model={"path": str(models("falcon"))}, quant=FOUR | ALLOWED, **changes)
    report = train(load(path), View())
    assert report.model.quantized_share == 0
    run = Path(report.run)
    words = "0.0% of the weights outside embeddings and head"
    assert words in qft("report", run).output
    assert words in (run / "report.html").read_text()


def test_a_calibration_is_held_to_the_same(models: Models, recipe_file: RecipeFile) -> None:
    calibration = {"quant": None, "model": {"path": str(models("mixtral"))}}
    path = recipe_file(**calibration, calibrate={"engine": "rtn"})
    told = refusal(path, plan_calibration)
    assert "calibrate: 11.1% of the weights" in told
    assert "calibrate.allow_partial" in told
    for meant in (ALLOWED, {"skip_modules": ["experts"]}):
        plan = plan_calibration(load(recipe_file(**calibration, calibrate={"engine": "rtn"} | meant)))
        assert plan.document().quantized_share == pytest.approx(MIXTRAL)


def test_a_calibration_of_a_model_without_linear_layers_says_so(models: Models, recipe_file: RecipeFile) -> None:
    path = recipe_file(quant=None, model={"path": str(models("gpt2"))}, calibrate={"engine": "rtn"})
    assert "is a torch.nn.Linear, and no other can be quantized" in refusal(path, plan_calibration)


def test_layers_that_cannot_be_measured_are_not_chosen(models: Models, recipe_file: RecipeFile) -> None:
    automatic = FOUR | {"skip_modules": "auto", "skip_budget_bits": 0.5}
    path = recipe_file(model={"path": str(models("gpt2"))}, quant=automatic)
    assert "quant.skip_modules: auto measures layers of torch.nn.Linear" in refusal(path)


def test_eval_and_chat_say_so_too(models: Models, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a text to read")
    held = "0.0% of the weights outside embeddings and head are quantized"
    target = f"{models('falcon')}@nf4"
    assert held in qft("chat", target, "--prompt", "Hello", "--max-new-tokens", 2).stderr
    assert held in " ".join(qft("eval", target, "--data", tmp_path / "text.txt").output.split())


def test_a_calibrations_report_tells_what_its_result_holds(recipe_file: RecipeFile) -> None:
    path = recipe_file(quant=None, calibrate={"engine": "rtn", "skip_modules": ["up_proj", "gate_proj", "down_proj"]})
    report = calibrate(load(path), View())
    assert report.quantized_share == pytest.approx(12288 / (12288 + 24576))
