"""train.stages: each goes on from what the last came to, and what was cut off comes to what an unbroken run does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qft.commands.train import train
from qft.documents.training import Report
from qft.progress import View
from qft.recipe import load
from tests.support.rows import chat, write_jsonl
from tests.support.runs import adapter, run

RecipeFile = Callable[..., Path]
FLOAT = {"dtype": "float32"}
DOWN = [
    {"quant.mode": "none", "max_steps": 3},
    {"quant.mode": "8bit", "max_steps": 2},
    {"quant.mode": "4bit", "max_steps": 3},
]
FULL = {
    "model": FLOAT,
    "adapter": {"kind": "none", "r": ..., "lora_dropout": ...},
    "train": {
        "learning_rate": 1e-3,
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "stages": [
            {"quant.mode": "none", "max_steps": 2},
            {"quant.mode": "qat", "quant.target": "int4-g32", "quant.fake_quant_after_steps": 1, "max_steps": 3},
        ],
    },
}


@pytest.fixture
def recipe(recipe_file: RecipeFile, tmp_path: Path) -> RecipeFile:
    """Writes a recipe of rows of many lengths, with dropout, into the run folder that it is told."""
    rows = [chat(f"count {n}", " ".join(map(str, range(n)))) for n in (1, 9, 2, 12, 5)]
    data = {"train": str(write_jsonl(tmp_path / "uneven.jsonl", rows))}
    data["eval"] = str(write_jsonl(tmp_path / "held.jsonl", rows[:2]))
    train = {"max_steps": ..., "per_device_train_batch_size": 1, "learning_rate": 1e-2, "report_to": []}
    train |= {"save_strategy": "steps", "save_steps": 2, "stages": DOWN}

    def write(folder: str = "part", **sections: Any) -> Path:
        wanted: dict[str, Any] = {"quant": None, "adapter": {"r": 4, "lora_dropout": 0.2}, "data": data, "train": train}
        wanted["output_dir"] = str(tmp_path / folder)
        for name, section in sections.items():
            wanted[name] = wanted.get(name, {}) | section if isinstance(section, dict) else section
        return recipe_file(f"{folder}.yaml", **wanted)

    return write


class Cut(View):
    """Ends the process, as it were, at the first event that begins so; None: at none."""

    def __init__(self, at: str | None = None) -> None:
        self.at, self.told = at, list[str]()

    def note(self, text: str) -> None:
        self.told.append(text)
        if self.at and text.startswith(self.at):
            raise KeyboardInterrupt

    def step(self, step: Any) -> None:
        self.note(f"made {step.step}")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    whole = folder / "model" / "model.safetensors"
    return load_file(whole) if whole.exists() else adapter(folder)


def assert_same(whole: Report, resumed: Report) -> None:
    """All that is learnt and measured, but for time and memory."""
    assert resumed.loss == whole.loss
    assert resumed.eval == whole.eval
    for one, other in zip(whole.stages, resumed.stages, strict=True):
        timed = {"throughput", "peak_bytes"}
        assert other.model_dump(exclude=timed) == one.model_dump(exclude=timed)
    for name, tensor in weights(Path(whole.run)).items():
        torch.testing.assert_close(tensor, weights(Path(resumed.run))[name], rtol=0, atol=0)


MOMENTS = ["made 3", "step 3: held-out", "Loading", "step 3: held-out", "made 4", "Loading", "made 5", "Evaluating"]
"""Of a chain, in which each is cut off at the next: within a stage, at its end, while the next one is loaded, in its
first evaluation and its first step. A resumed run begins with `Loading`."""
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "down": ({}, MOMENTS),
    "all weights": (FULL, ["made 3", "step 2: held-out", "made 4"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_cut_off_anywhere_comes_to_the_same(case: str, recipe: RecipeFile) -> None:
    sections, moments = CASES[case]
    whole = run(recipe("whole", **sections))
    path, begun = recipe(**sections), False
    for moment in moments:
        with pytest.raises(KeyboardInterrupt):
            train(load(path), Cut(moment), resume=begun)
        begun = True
    assert_same(whole, run(path, resume=True))
