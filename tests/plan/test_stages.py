"""The plan of a training in stages: each as if it were alone, and what of them counts together."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qft.commands.check import planned
from qft.documents.plan import PlanDocument
from qft.errors import RecipeError
from qft.plan import make_plan
from qft.recipe import load
from qft.views.terminal.plan import render_plan
from tests.support.models import tiny_llama

RecipeFile = Callable[..., Path]
DOWN: list[dict[str, Any]] = [
    {"quant.mode": "none", "num_train_epochs": 1.5},
    {"quant.mode": "8bit", "max_steps": 2, "reset_lr_scheduler": True},
    {"quant.mode": "4bit", "max_steps": 3, "reset_optimizer": True},
]


@pytest.fixture
def path(recipe_file: RecipeFile) -> Path:
    """Of sixteen rows, four in a step."""
    return recipe_file(quant=None, train={"max_steps": ..., "stages": DOWN})


def test_steps_and_schedules_are_counted_over_stages(path: Path) -> None:
    plan = make_plan(load(path))
    assert [(stage.start, stage.steps) for stage in plan.stages] == [(0, 6), (6, 8), (8, 11)]
    assert [stage.training["max_steps"] for stage in plan.stages] == [6, 8, 11]
    assert [stage.span and stage.span.schedule_steps for stage in plan.stages] == [6, 5, 5]
    assert [stage.leads_on for stage in plan.stages] == [True, True, False]
    first, second, third = plan.stages
    assert first.data is second.data is third.data  # read and encoded once


def test_check_shows_each_and_what_the_largest_takes(path: Path) -> None:
    document = planned(load(path))
    assert isinstance(document, PlanDocument)
    assert [stage.quantization.scheme for stage in document.stages] == ["none", "8bit", "4bit"]
    assert (document.quantization.scheme, document.steps) == ("4bit", 11)
    peaks = [stage.memory.predicted_peak_bytes or 0 for stage in document.stages if stage.memory]
    assert document.memory
    assert document.memory.predicted_peak_bytes == max(peaks) == peaks[0] > peaks[2]
    console = Console(file=io.StringIO(), width=160)
    console.print(render_plan(document))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Stages" in shown
    assert "7 to 8" in shown
    assert "linear from 0.0002, anew" in shown


def test_memory_is_made_to_fit_in_each(recipe_file: RecipeFile, tmp_path: Path) -> None:
    """What `auto` comes to is each stage's own, and stands in the recipe that the run keeps."""
    tiny_llama(hidden_size=128, intermediate_size=1024).save_pretrained(tmp_path / "large")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        source = Path(load(recipe_file()).recipe.model.path) / name
        if source.exists():
            (tmp_path / "large" / name).write_bytes(source.read_bytes())
    train = {"max_steps": 1, "per_device_train_batch_size": "auto", "gradient_accumulation_steps": 2}
    stages = [{"quant.mode": "none"}, {"quant.mode": "4bit"}]
    sections: dict[str, Any] = {"quant": None, "model": {"path": str(tmp_path / "large")}}
    sections["train"] = train | {"stages": stages}
    free = make_plan(load(recipe_file(**sections)))
    peaks = [stage.memory.predicted_peak_bytes or 0 for stage in free.stages]
    tight = make_plan(load(recipe_file(**sections, memory={"budget": sum(peaks) // 2})))
    rows = [stage.recipe.train.micro_batch for stage in tight.stages]
    assert rows[0] < rows[1]
    assert [stage.recipe.train.step_rows for stage in tight.stages] == [2, 2]
    written = [dict(pairs) for pairs in tight.recipe.train.stages]
    assert written[0]["per_device_train_batch_size"] == rows[0]
    assert tight.recipe.train.per_device_train_batch_size == rows[1]


def test_what_a_stage_cannot_do_is_refused_on_its_line(recipe_file: RecipeFile) -> None:
    stages = [{"quant.mode": "none", "max_steps": 1}, {"quant.mode": "4bit", "max_steps": 1, "fp16": True}]
    path = recipe_file(quant=None, model={"device": "cpu"}, train={"max_steps": ..., "stages": stages})
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "fp16" in text)
    with pytest.raises(RecipeError, match=rf"recipe\.yaml:{line}: train\.fp16: .*\(in train\.stages\.1\)"):
        make_plan(load(path))
