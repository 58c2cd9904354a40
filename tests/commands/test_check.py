"""`qft check`: the facts of both plans, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from qft.commands.calibrate import find_plan
from qft.commands.check import planned
from qft.plan import make_plan
from qft.recipe import load
from tests.support.rows import chat, write_jsonl

RecipeFile = Callable[..., Path]


@pytest.mark.parametrize("on_too_long", ["stop", "truncate", "skip"])
def test_what_is_trained_and_calibrated_on_the_same_rows_is_encoded_once(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_too_long: str
) -> None:
    rows = write_jsonl(tmp_path / "many.jsonl", [chat(f"say {i}", f"it is {i}" * (i % 9)) for i in range(1, 60)])
    policy = {"on_too_long": on_too_long, "max_length": 512 if on_too_long == "stop" else 60}
    data = {"train": str(rows), "eval_fraction": 0.1, "on_bad_row": "skip", **policy}
    calibrate = {"preset": "w8a8-static", "samples": 4, "max_length": 64}
    loaded = load(recipe_file(quant=None, data=data, calibrate=calibrate))
    apart = make_plan(loaded).facts() | {"calibration": find_plan(loaded)[0].facts()}
    encoded: list[int] = []
    real = Dataset.map
    monkeypatch.setattr(
        Dataset, "map", lambda rows, *args, **kw: (encoded.append(len(rows)), real(rows, *args, **kw))[1]
    )
    assert planned(loaded) == apart
    assert encoded == [59]
    other: dict[str, Any] = {"data": str(write_jsonl(tmp_path / "own.jsonl", [chat(f"{i}", "yes") for i in range(40)]))}
    assert planned(loaded.having(calibrate=other))["calibration"]["data"] != apart["calibration"]["data"]
    assert encoded == [59, 59, 40]
