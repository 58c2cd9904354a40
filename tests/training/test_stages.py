"""train.stages: each goes on from what the last came to, and what was cut off comes to what an unbroken run does."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qft.commands.train import train
from qft.documents.training import Report
from qft.progress import Step, View
from qft.recipe import load
from tests.support.rows import chat, write_jsonl
from tests.support.runs import run

RecipeFile = Callable[..., Path]
FLOAT = {"dtype": "float32"}
DOWN = [
    {"quant.mode": "none", "max_steps": 3},
    {"quant.mode": "8bit", "max_steps": 2},
    {"quant.preset": "finetune", "max_steps": 3},
]


@pytest.fixture
def recipe(recipe_file: RecipeFile, tmp_path: Path) -> RecipeFile:
    """Writes a recipe of rows of many lengths, with dropout, into the run folder that it is told."""
    rows = [chat(f"count {n}", " ".join(map(str, range(n)))) for n in (1, 9, 2, 12, 5, 20, 3)]
    data = {"train": str(write_jsonl(tmp_path / "uneven.jsonl", rows))}
    data["eval"] = str(write_jsonl(tmp_path / "held.jsonl", rows[:2]))
    train = {"max_steps": ..., "per_device_train_batch_size": 1, "learning_rate": 1e-2, "report_to": []}
    train |= {"save_strategy": "no", "stages": DOWN}

    def write(folder: str, **sections: Any) -> Path:
        wanted: dict[str, Any] = {"quant": None, "adapter": {"lora_dropout": 0.2}, "data": data, "train": train}
        wanted["output_dir"] = str(tmp_path / folder)
        for name, section in sections.items():
            wanted[name] = wanted.get(name, {}) | section if isinstance(section, dict) else section
        return recipe_file(f"{folder}.yaml", **wanted)

    return write


def test_scratch(recipe):
    class V(View):
        def note(self, t): print(t)
        def step(self, s): print(s.step, s.loss, s.learning_rate)
    r = train(load(recipe("whole")), V())
    print(r.model_dump_json(indent=1, include={"stages", "eval", "loss"}))
    import os
    print(sorted(str(p) for p in Path(r.run).rglob("*")))
    assert 0
