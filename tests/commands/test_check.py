"""`qft check`: the facts of both plans, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from qft.commands.calibrate import find_plan
from qft.commands.check import planned
from qft.documents.plan import PlanDocument
from qft.export import EXPORTERS
from qft.plan import make_plan
from qft.recipe import load
from tests.support.rows import chat, write_jsonl

RecipeFile = Callable[..., Path]


@pytest.mark.parametrize("on_too_long", ["truncate", "skip"])
def test_what_is_trained_and_calibrated_on_the_same_rows_is_encoded_once(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_too_long: str
) -> None:
    rows = write_jsonl(tmp_path / "many.jsonl", [chat(f"say {i}", f"it is {i}" * (i % 9)) for i in range(1, 60)])
    policy = {"on_too_long": on_too_long, "max_length": 60}
    data = {"train": str(rows), "eval_fraction": 0.1, "on_bad_row": "skip", **policy}
    calibrate = {"preset": "w8a8-static", "samples": 4, "max_length": 64}
    loaded = load(recipe_file(quant=None, data=data, calibrate=calibrate))
    calibration = find_plan(loaded)[0].document()
    apart = make_plan(loaded).document().model_copy(update={"calibration": calibration})
    encoded: list[int] = []
    real = Dataset.map

    def counted(rows: Any, *args: Any, **options: Any) -> Any:
        encoded.append(len(rows))
        return real(rows, *args, **options)

    monkeypatch.setattr(Dataset, "map", counted)
    found = planned(loaded)
    assert isinstance(found, PlanDocument)
    # What is predicted of the host begins with the process as it stands.
    assert found.exports is not None
    assert [name for name, why in found.exports.items() if why] == ["gguf-q4_k"]  # blocks longer than the rows
    assert list(found.exports) == list(EXPORTERS)
    assert found == apart.model_copy(update={"exports": found.exports, "memory": found.memory})
    assert encoded == [59]
    other: dict[str, Any] = {"data": str(write_jsonl(tmp_path / "own.jsonl", [chat(f"{i}", "yes") for i in range(40)]))}
    changed = planned(loaded.having(calibrate=other)).calibration
    assert changed is not None
    assert changed.data != calibration.data
    assert encoded == [59, 59, 40]
