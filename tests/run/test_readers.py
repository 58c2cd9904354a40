"""A run that is replaced while it is read: the reader says so, and makes nothing of two runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qft.commands.calibrate import calibrate
from qft.commands.evaluate import EvalOptions, evaluate
from qft.errors import BusyError
from qft.export import ExportOptions, export
from qft.progress import View
from qft.recipe import load
from tests.support.once import once
from tests.support.runs import run

RecipeFile = Callable[..., Path]


class Replaces(View):
    """Trains the run anew once something is told."""

    def __init__(self, recipe: Path, told: str) -> None:
        self.recipe, self.told = recipe, told

    def note(self, text: str) -> None:
        if self.told and text.startswith(self.told):
            self.told = ""
            run(self.recipe, overwrite=True)


@pytest.mark.parametrize(
    ("work", "told"),
    [
        ("eval", "Evaluating"),
        ("export", "Asking the model as trained"),
        ("export", "Writing merged"),
        ("calibrate", "block 1"),
    ],
)
def test_a_run_that_is_replaced_while_it_is_read(
    work: str, told: str, recipe_file: RecipeFile, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def make(folder: Path) -> None:
        run(recipe_file("first.yaml", output_dir=str(folder / "run")))

    shutil.copytree(once(tmp_path_factory, "replaced", make) / "run", tmp_path / "run")
    recipe = recipe_file()
    view, folder, out = Replaces(recipe, told), tmp_path / "run", tmp_path / "out"

    def read() -> None:
        if work == "eval":
            evaluate([str(folder)], EvalOptions(data=str(tmp_path / "chats.jsonl"), out=out), view)
        elif work == "calibrate":
            model = {"path": str(folder)}
            own = {"engine": "rtn", "bits": 8, "verify_samples": 2}
            path = recipe_file(
                "quantize.yaml", model=model, adapter=None, train=None, quant=None, calibrate=own, output_dir=str(out)
            )
            calibrate(load(path), view, overwrite=(out / "manifest.json").exists())
        else:
            export(folder, ExportOptions(to=("merged",), out=out, gate=told != "Writing merged"), view)

    with pytest.raises(BusyError, match="replaced the run while it was read; try again"):
        read()
    assert not view.told
    results = {"merged", "eval.json", "model", "report.json"}
    assert not out.exists() or not results & {path.name for path in out.iterdir()}
    read()
    assert results & {path.name for path in out.iterdir()}
