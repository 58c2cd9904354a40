"""Calibrations of the tiny model, why they are refused, and what their results make of held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qft.commands.calibrate import calibrate, find_plan
from qft.commands.evaluate import EvalOptions, evaluate
from qft.documents.calibration import CalibrationReport
from qft.errors import QftError
from qft.files import sha256
from qft.progress import View
from qft.recipe import load
from tests.support.known import known


def calibrated(path: Path, **arguments: Any) -> CalibrationReport:
    return calibrate(load(path), View(), **arguments)


def refusal(path: Path, **arguments: Any) -> QftError:
    with pytest.raises(QftError) as caught:
        calibrated(path, **arguments)
    return caught.value


def weights(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def perplexity(report: CalibrationReport, path: Path) -> float:
    """Of the result, loaded again, on the verification rows."""
    run = str(Path(report.result or "").parent)
    return known(evaluate([run], EvalOptions(data=held_out(report, path)), View()).targets[0].perplexity)


def held_out(report: CalibrationReport, path: Path) -> str:
    """The verification rows as a file of their own."""
    plan, _ = find_plan(load(path))
    lines = (path.parent / "rows.jsonl").read_text().splitlines(keepends=True)
    file = path.parent / "held_out.jsonl"
    file.write_text("".join(lines[row["row"]] for row in plan.data.verify))
    return str(file)
