"""Recipes that calibrate the tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.rows import chat, write_jsonl

RecipeFile = Callable[..., Path]


@pytest.fixture
def recipe(recipe_file: RecipeFile, tmp_path: Path) -> RecipeFile:
    """Writes a recipe that calibrates the tiny model; `calibrate` updates its section."""
    rows = [chat(f"say {i}", f"it is {i} and {i * 7} and {i * 13}") for i in range(32)]
    write_jsonl(tmp_path / "rows.jsonl", rows)

    def write(name: str = "recipe.yaml", **sections: Any) -> Path:
        own: dict[str, Any] = {"engine": "rtn", "max_length": 32, "verify_samples": 8, **sections.pop("calibrate", {})}
        if own["engine"] == "autoround":
            own.setdefault("samples", 4)
        return recipe_file(
            name,
            quant=sections.pop("quant", None),
            adapter=None,
            train=None,
            data={"train": "rows.jsonl", "max_length": ..., **sections.pop("data", {})},
            calibrate=own,
            **sections,
        )

    return write
