"""A disk that fills up while something is written: one message, and what was complete stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qft.commands.calibrate import calibrate
from qft.commands.evaluate import EvalOptions, evaluate
from qft.errors import RunError
from qft.export import ExportOptions, export
from qft.progress import View
from qft.recipe import load
from qft.run.folder import Run
from tests.support.disks import fill
from tests.support.rows import chat, write_jsonl
from tests.support.runs import run

FULL = "the disk is full; free some space"


class Filling(View):
    """Fills a disk once something is said."""

    def __init__(self, text: str, disk: Path) -> None:
        self.text, self.disk = text, disk

    def note(self, text: str) -> None:
        if self.text in text:
            fill(self.disk)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export(disk: Path, recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    run(recipe_file())
    options = ExportOptions(to=("merged",), out=disk / "out", overwrite=True)
    export(tmp_path / "run", options, View())
    before = tree(disk)
    for moment in ("Asking the model", "Writing merged", "Loading merged again"):
        with pytest.raises(RunError, match=r"the disk (is full|has 0 bytes free); free some space") as caught:
            export(tmp_path / "run", options, Filling(moment, disk))
        assert caught.value.exit_code == 7
        (disk / "full").unlink()
        assert tree(disk) == before


def test_a_calibration(disk: Path, recipe_file: Callable[..., Path]) -> None:
    recipe = recipe_file(quant=None, calibrate={"engine": "rtn", "verify_samples": 4}, output_dir=str(disk / "run"))
    calibrate(load(recipe), View())
    before = tree(disk / "run")
    with pytest.raises(RunError, match=FULL):
        calibrate(load(recipe), Filling("block 1", disk), overwrite=True)
    manifest = Run(disk / "run").manifest()
    assert manifest
    assert manifest.status == "failed"
    assert FULL in (manifest.error or "")
    assert tree(disk / "run" / "replaced-1") == before


def test_an_evaluation(disk: Path, tiny_model: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat("say 1", "it is 1")])
    options = EvalOptions(data=str(rows), out=disk / "out")
    evaluate([str(tiny_model)], options, View())
    before = tree(disk)
    with pytest.raises(RunError, match=FULL):
        evaluate([str(tiny_model)], options, Filling("Evaluating", disk))
    (disk / "full").unlink()
    assert tree(disk) == before
