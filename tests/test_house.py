"""The house: what its figures must be, and that underscores are kept to."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

from tests.support.paths import ROOT

MODULES = sorted((ROOT / "qft").rglob("*.py"))
ROOMS = sorted(path.parent for path in MODULES if path.name == "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_short_and_takes_nobodys_private_names(path: Path) -> None:
    source = path.read_text("utf-8")
    tree = ast.parse(source)
    assert len(source.splitlines()) <= 350
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 50] == []
    taken = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "qft" in (node.module or "")]
    assert [name.name for node in taken for name in node.names if name.name.startswith("_")] in ([], ["__version__"])


def test_few_modules_lie_loose() -> None:
    assert len([path for path in MODULES if path.parent == ROOT / "qft"]) <= 6


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_rooms_public_names_are_there(room: Path) -> None:
    module = importlib.import_module(".".join(room.relative_to(ROOT).parts))
    assert module.__doc__
    assert [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)] == []
