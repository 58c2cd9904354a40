"""train.stages as it is written: what each stage comes to, and what is refused with the line that it is on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qft.errors import RecipeError
from qft.recipe import dump, load
from qft.recipe.stages import stages_of

RecipeFile = Callable[..., Path]


@pytest.fixture
def recipe(recipe_file: RecipeFile) -> Callable[..., Path]:
    """Writes a recipe with those stages, its other sections updated."""

    def write(*stages: dict[str, Any], **sections: Any) -> Path:
        train = {"max_steps": ..., "stages": list(stages)} | sections.pop("train", {})
        return recipe_file(train=train, **sections)

    return write


def wholes(path: Path) -> list[dict[str, Any]]:
    """What each stage comes to; presets have been applied."""
    return [stage.recipe.model_dump(exclude={"quant": {"preset"}}) for stage in stages_of(load(path))]


def test_a_stage_is_the_recipe_with_what_it_sets(recipe: RecipeFile) -> None:
    """What then has no meaning is left out, and the last one is what the recipe says to all but the training."""
    path = recipe(
        {"quant.mode": "none", "max_steps": 3},
        {"quant.mode": "8bit", "quant.threshold": 4.0, "train.learning_rate": 5e-5, "num_train_epochs": 2.0},
        {"quant.preset": "inference", "reset_lr_scheduler": True, "lr_scheduler_type": "cosine"},
        quant={"preset": "finetune", "skip_modules": ["o_proj"]},
        train={"max_steps": 9, "learning_rate": 1e-4},
    )
    loaded = load(path)
    first, second, third = (stage.recipe for stage in stages_of(loaded))
    assert (first.quant.mode, first.quant.compute_dtype, first.quant.skip_modules) == ("none", "auto", ())
    assert (first.train.max_steps, first.train.learning_rate) == (3, 1e-4)
    assert (second.quant.mode, second.quant.threshold, second.quant.skip_modules) == ("8bit", 4.0, ("o_proj",))
    assert (second.train.max_steps, second.train.num_train_epochs, second.train.learning_rate) == (-1, 2.0, 5e-5)
    assert (third.quant.quant_type, third.quant.compute_dtype, third.train.max_steps) == ("fp4", "float32", 9)
    assert third.quant == loaded.recipe.quant
    assert third.train.lr_scheduler_type == loaded.recipe.train.lr_scheduler_type == "cosine"
    resets = [(stage.stage.resets("optimizer"), stage.stage.resets("lr_scheduler")) for stage in stages_of(loaded)]  # type: ignore[union-attr]
    assert resets == [(False, False), (False, False), (False, True)]


LISTS: dict[str, list[dict[str, Any]]] = {
    "down": [{"quant.mode": "none"}, {"quant.mode": "8bit", "max_steps": 5}, {"quant.preset": "finetune"}],
    "up": [{"quant.quant_type": "fp4"}, {"quant.mode": "none", "learning_rate": 1e-5}],
    "to be deployed": [{"quant.mode": "none"}, {"quant.mode": "qat", "quant.target": "int8", "num_train_epochs": 0.5}],
    "one": [{"max_steps": 4}],
    "by a plugin": [{"quant.mode": "custom", "quant.plugin": "mine.py"}, {"quant.mode": "4bit"}],
}


@pytest.mark.parametrize("name", LISTS)
def test_what_a_run_writes_down_is_the_same_stages(name: str, recipe: RecipeFile, tmp_path: Path) -> None:
    path = recipe(*LISTS[name], train={"max_steps": 7}, quant={"preset": ..., "mode": "4bit"})
    written = tmp_path / "written.yaml"
    written.write_text(dump(load(path).recipe))
    assert wholes(written) == wholes(path)
    assert dump(load(written).recipe) == written.read_text()


def test_paths_are_relative_to_the_recipe(recipe: RecipeFile, tmp_path: Path) -> None:
    path = recipe({"quant.mode": "custom", "quant.plugin": "mine.py", "max_steps": 1}, quant={"preset": ...})
    assert load(path).recipe.quant.plugin == str(tmp_path / "mine.py")


def test_they_can_be_set_where_the_command_is_given(recipe_file: RecipeFile) -> None:
    loaded = load(recipe_file(), ["train.stages=[{quant.mode: 8bit, max_steps: 1}, {max_steps: 2}]"])
    assert [stage.recipe.quant.mode for stage in stages_of(loaded)] == ["8bit", "4bit"]


NONE, EIGHT = {"quant.mode": "none", "max_steps": 1}, {"quant.mode": "8bit", "max_steps": 1}
HELD_OUT = {"data": {"eval_fraction": 0.5}}
BEST = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
REFUSED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "misspelled": (
        [NONE | {"quant.mod": "8bit"}],
        {},
        r"train\.stages\.0\.quant\.mod: unknown field, did you mean quan",
    ),
    "bare": ([NONE, {"learning_rat": 1.0}], {}, r"train\.stages\.1\.learning_rat: unknown field, did you mean learni"),
    "a section": ([{"quant": {"mode": "8bit"}}], {}, r"train\.stages\.0\.quant: unknown field"),
    "twice": ([NONE | {"train.max_steps": 2}], {}, r"train\.stages\.0\.(train\.)?max_steps: given twice"),
    "the adapter": ([NONE | {"adapter.r": 8}], {}, r"train\.stages\.0\.adapter\.r: is the same in all stages"),
    "the rows": ([NONE | {"data.train": "x"}], {}, r"train\.stages\.0\.data\.train: is the same in all stages"),
    "the run's": ([NONE | {"report_to": []}], {}, r"train\.stages\.0\.report_to: is one for the whole run"),
    "nested": ([NONE | {"stages": []}], {}, r"train\.stages\.0\.stages: is one for the whole run"),
    "a type": ([NONE, EIGHT | {"learning_rate": "much"}], {}, r"train\.learning_rate: should be .*not 'much'"),
    "a range": ([EIGHT | {"quant.mode": "3bit"}], {}, r"quant\.mode: should be .*not '3bit'"),
    "no list": ([{"max_steps": 0}], {}, r"train\.max_steps: 0 steps train nothing"),
    "unread in one": ([NONE | {"quant.threshold": 1.0}], {}, r"quant\.threshold: has a meaning only with .* 8bit"),
    "unread in all": ([NONE, EIGHT], {"quant": {"preset": ..., "quant_type": "fp4"}}, r"quant\.quant_type: has a mea"),
    "preset for none": (
        [NONE, EIGHT],
        {"quant": {"preset": "finetune"}},
        r"quant\.preset: finetune is a preset for 4bit, which no stage is",
    ),
    "a stage's rule": ([NONE, {"quant.mode": "qat"}], {}, r"quant\.target: .*needs the format.*train\.stages\.1"),
    "all weights": (
        [NONE, EIGHT],
        {"adapter": {"kind": "none", "r": ...}},
        r"adapter\.kind: quantized weights cannot be trained.*\(in train\.stages\.1\)",
    ),
    "moved base": (
        [NONE, EIGHT],
        {"adapter": {"init_lora_weights": "pissa"}},
        r"adapter\.init_lora_weights: pissa .*\(in train\.stages\.1\)",
    ),
    "error of 4 bits": (
        [{"quant.mode": "4bit", "max_steps": 1}, EIGHT],
        {"adapter": {"init_lora_weights": "loftq"}},
        r"adapter\.init_lora_weights: loftq .*\(in train\.stages\.1\)",
    ),
    "nothing to reset": ([NONE | {"reset_optimizer": True}], {}, r"train\.stages\.0\.reset_optimizer: the first stage"),
    "no switch": ([NONE, EIGHT | {"reset_optimizer": "yes please"}], {}, r"reset_optimizer: should be true or false"),
    "rows of a step": (
        [NONE, EIGHT | {"gradient_accumulation_steps": 3}],
        {},
        r"accumulation_steps: steps have 6 rows",
    ),
    "another optimizer": ([NONE, EIGHT | {"optim": "sgd"}], {}, r"train\.optim: .*set reset_optimizer to true"),
    "another schedule": ([NONE, EIGHT | {"lr_scheduler_type": "cosine"}], {}, r"set reset_lr_scheduler to true"),
    "the best": ([NONE | BEST, EIGHT], HELD_OUT, r"train\.load_best_model_at_end: .*set it in the last"),
    "measured": (
        [{"quant.mode": "8bit", "quant.skip_modules": "auto", "quant.skip_budget_bits": 1.0}],
        {},
        r"quant\.skip_modules: auto is measured once",
    ),
    "learnt scales": (
        [NONE, {"quant.mode": "qat", "quant.target": "int4-g32", "quant.learn_scales": True, "max_steps": 1}],
        {},
        r"quant\.learn_scales: scales are trained in one .* set reset_optimizer to true",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_on_its_line(name: str, recipe: RecipeFile) -> None:
    stages, sections, message = REFUSED[name]
    path = recipe(*stages, **{"quant": {"preset": ...}} | sections)
    with pytest.raises(RecipeError, match=message) as caught:
        load(path)
    lines = path.read_text().splitlines()
    for problem in caught.value.problems:
        place, field, *_ = problem.removeprefix(f"{path}:").split(": ")
        asked = lines[int(place) - 1].strip(" -").partition(":")[0]
        assert field.endswith(asked) or asked in ("stages", "train", *(key for stage in stages for key in stage)), (
            problem
        )


@pytest.mark.parametrize(
    "stages",
    [
        [NONE, EIGHT | {"optim": "sgd", "reset_optimizer": True}],
        [NONE, EIGHT | {"warmup_steps": 2.0, "reset_lr_scheduler": True}],
        [NONE, EIGHT | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}],
        [NONE, EIGHT | BEST | {"early_stopping_patience": 1}],
    ],
    ids=["optimizer", "schedule", "micro-batches", "best"],
)
def test_what_is_meant_is_taken(stages: list[dict[str, Any]], recipe: RecipeFile) -> None:
    assert len(load(recipe(*stages, quant={"preset": ...}, **HELD_OUT)).recipe.train.stages) == 2


def test_what_no_stage_would_hear_is_refused(recipe: RecipeFile) -> None:
    path = recipe({"max_steps": 1}, {"num_train_epochs": 1.0})
    assert load(path, ["train.learning_rate=1e-5"]).recipe.train.learning_rate == 1e-5
    with pytest.raises(RecipeError, match=r"--set train\.max_steps: .*each of train\.stages sets it for itself"):
        load(path, ["train.max_steps=5"])
