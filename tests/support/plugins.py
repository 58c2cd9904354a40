"""The quantizer that is shipped as an example, and recipes that hold a model by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

SHIPPED = ROOT / "recipes" / "custom" / "int8_symmetric.py"


def custom(plugin: Path | str, **quant: Any) -> dict[str, Any]:
    return {"preset": None, "mode": "custom", "plugin": str(plugin), **quant}


def changed(plugin: Path, old: str, new: str) -> Path:
    text = plugin.read_text()
    assert old in text
    plugin.write_text(text.replace(old, new))
    return plugin
