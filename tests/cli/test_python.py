"""The commands from Python, as recipes/quickstart.ipynb calls them."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qft
from qft.errors import RecipeError
from tests.support.paths import ROOT

RecipeFile = Callable[..., Path]


def shown(code: str, names: dict[str, Any]) -> Any:
    """What a cell ends with, run as a notebook runs it."""
    tree = ast.parse(code)
    last = tree.body.pop()
    assert isinstance(last, ast.Expr)
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_the_notebook(recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells, on the tiny model in place of the package's."""
    recipe_file("quickstart.yaml", train={"max_steps": 1}, quant={"mode": "none", "preset": ...})
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "recipes" / "quickstart.ipynb").read_text("utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    plan, report = (shown(cell, names) for cell in cells)
    assert "LoRA" in plan._repr_html_() or "lora" in plan._repr_html_()
    assert report.document.model_dump(mode="json") == json.loads((tmp_path / "run" / "report.json").read_text())
    assert report._repr_html_().startswith("<pre")
    assert "loss" in repr(report)


def test_errors_are_those_of_the_commands(recipe_file: RecipeFile) -> None:
    with pytest.raises(RecipeError, match=r"--set train\.max_steps: train\.max_steps: 0 steps train nothing"):
        qft.check(recipe_file(), {"train.max_steps": 0})
    with pytest.raises(RecipeError, match=r"--set train\.max_steps: train\.max_steps: 0 steps train nothing"):
        qft.check(recipe_file(), {"train.max_steps": np.int64(0)})
    with pytest.raises(ValueError, match="give one of the two"):
        qft.train(recipe_file(), resume=True, overwrite=True)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = qft.trian
