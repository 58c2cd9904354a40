"""`qft check` refuses the numbers that `qft train` could not live with, by their fields."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import qft
from tests.support.rows import chat, write_jsonl

RecipeFile = Callable[..., Path]
HUGE = 10**12
LISTED = {"target_modules": ["q_proj"]}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a rank": ({"adapter": {"r": HUGE}}, "adapter.r: should be 2147483647 or less"),
    "a rank beyond 64 bits": ({"adapter": {"r": 10**30}}, "adapter.r: should be 2147483647 or less"),
    "adapters beyond the memory": ({"adapter": {"r": 10**9}}, "adapter.r: the weights of the adapters alone take"),
    "a rank that pissa cannot have": (
        {"adapter": {"r": 65, "init_lora_weights": "pissa_niter_2"}, "quant": None},
        "has a rank of at most 64, which init_lora_weights pissa_niter_2 cannot exceed",
    ),
    "a rank that olora cannot have": (
        {"adapter": {"r": 65, "init_lora_weights": "olora"}, "quant": None},
        "adapter.r: 65",
    ),
    "a rank that loftq cannot have": ({"adapter": {"r": 65, "init_lora_weights": "loftq"}}, "adapter.r: 65"),
    "a block among others": (
        {"adapter": LISTED | {"layers_to_transform": [0, 2]}},
        "adapter.layers_to_transform: 2: no block of that number holds target_modules; those that do are from 0 to 1",
    ),
    "a batch": ({"train": {"per_device_train_batch_size": HUGE}}, "train.per_device_train_batch_size: should be"),
    "accumulation": ({"train": {"gradient_accumulation_steps": HUGE}}, "train.gradient_accumulation_steps: should be"),
    "steps": ({"train": {"max_steps": HUGE}}, "train.max_steps: should be"),
    "epochs": (
        {"train": {"max_steps": ..., "num_train_epochs": 1e300}},
        "train.num_train_epochs: 1e+300 epochs are more",
    ),
    "workers": ({"train": {"dataloader_num_workers": 10**6}}, "train.dataloader_num_workers: 1000000 processes"),
    "processes": ({"data": {"num_proc": 10**6}}, "data.num_proc: 1000000 processes"),
    "a file's samples": ({"calibrate": {"samples": HUGE}}, "calibrate.samples: should be"),
}


@pytest.mark.parametrize(("sections", "message"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused_by_its_field(sections: dict[str, Any], message: str, recipe_file: RecipeFile) -> None:
    found = qft("check", recipe_file(**sections))
    assert found.exit_code == 2
    assert message in found.stderr
    assert all(line.startswith(("error: ", str(recipe_file()))) for line in found.stderr.splitlines())


def test_a_weight_that_repeats_rows_for_ever(recipe_file: RecipeFile, chat_file: Path) -> None:
    found = qft("check", recipe_file(data={"train": [{"path": str(chat_file), "weight": 1e300}]}))
    assert found.exit_code == 5
    assert f"{chat_file}: its weight 1e+300 makes more than" in found.stderr


def test_numbers_that_are_large_and_mean_something(recipe_file: RecipeFile, tmp_path: Path) -> None:
    train = {
        "warmup_steps": 1e9,
        "logging_steps": 10**9,
        "per_device_train_batch_size": 10**9,
        "save_total_limit": 10**9,
    }
    data = {"train": str(write_jsonl(tmp_path / "few.jsonl", [chat("say", "it")] * 2)), "num_proc": 64}
    found = qft("check", recipe_file(train=train, data=data, adapter={"r": 200}, seed=2**32 - 1))
    assert (found.exit_code, found.stderr) == (0, "")


def test_a_figure_that_is_not_finite_has_its_exit_code(recipe_file: RecipeFile) -> None:
    found = qft("train", recipe_file(adapter={"lora_alpha": 1e308}, data={"eval_fraction": 0.2}))
    assert found.exit_code == 8
    [line] = found.stderr.splitlines()
    assert "not finite" in line or "NaN or infinite" in line
