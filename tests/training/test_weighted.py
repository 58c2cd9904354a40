"""Trainings in which tokens count differently: their losses are weighted means, and held-out rows are asked plainly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from qft.errors import RecipeError
from qft.plan import make_plan
from qft.recipe import load
from tests.support.rows import chat, write_jsonl
from tests.support.runs import run

RecipeFile = Callable[..., Path]
DATA = {"prompt_loss_weight": 0.3, "packing": True, "eval_fraction": 0.25}
STEP = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no"}


def weighted_mean(base: Path, rows: Any, prompt: float) -> float:
    """In float64, one example after the other; whatever has no label counts `prompt`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    total = count = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        weights = torch.tensor([1.0 if label >= 0 else prompt for label in row["labels"]], dtype=torch.float64)[1:]
        with torch.no_grad():
            losses = cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        total, count = total + float((losses * weights).sum()), count + float(weights.sum())
    return total / count


def test_a_step_is_the_weighted_mean_of_its_tokens(recipe_file: RecipeFile, tiny_model: Path) -> None:
    settings = {"quant": None, "model": {"path": str(tiny_model), "dtype": "float32", "device": "cpu"}}
    path = recipe_file(data=DATA, train=STEP | {"gradient_accumulation_steps": 2}, **settings)
    data = make_plan(load(path)).data
    assert len(data.train) == 12
    assert len(data.batched) == 4, "all of them in one step of two micro-batches"
    report = run(path)
    assert report.loss.first == pytest.approx(weighted_mean(tiny_model, data.train, 0.3), rel=1e-5)
    assert report.loss.first != pytest.approx(weighted_mean(tiny_model, data.train, 0.0), rel=1e-3)
    assert report.eval.before is not None
    assert report.eval.before.loss == pytest.approx(weighted_mean(tiny_model, data.eval, 0.0), rel=1e-5)


@pytest.mark.parametrize("field", ["label_smoothing_factor", "torch_compile", "chunked_loss"])
def test_what_cannot_be_weighted_is_refused_by_its_field(recipe_file: RecipeFile, tmp_path: Path, field: str) -> None:
    value = {"label_smoothing_factor": 0.1, "torch_compile": True, "chunked_loss": False}[field]
    rows = [chat(f"say {i}", "it is") for i in range(4)]
    rows[2]["messages"][1]["weight"] = 0.5
    asked = {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows))}
    path = recipe_file(data=asked, train=STEP | {field: value}, quant=None)
    with pytest.raises(RecipeError, match=rf"train\.{field}: .*tokens are weighted"):
        make_plan(load(path))
