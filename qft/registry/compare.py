"""Two versions side by side."""

from __future__ import annotations

from typing import Any, NamedTuple

import yaml

from qft.registry.shelf import Record

__all__ = ["Row", "diff"]

ALWAYS = ("target", "bytes", "scores", "gate")
"""Sections told whether or not they differ; recipe, data and base are long, and told where they do."""


class Row(NamedTuple):
    """One figure or field of two versions; None where a version has none."""

    section: str
    field: str
    """Dotted within the section; empty where the section is one value."""
    a: Any
    b: Any


def diff(a: Record, b: Record) -> list[Row]:
    """What two manifests say: target, bytes, scores and gate figures, and where recipe, data and base differ."""
    left, right = _sections(a), _sections(b)
    rows = []
    for section in left:
        fields = list(dict.fromkeys([*left[section], *right[section]]))
        rows += [Row(section, name, left[section].get(name), right[section].get(name)) for name in fields]
    return [row for row in rows if row.section in ALWAYS or row.a != row.b]


def _sections(manifest: Record) -> dict[str, Record]:
    recipe = (manifest.get("recipe") or {}).get("text")
    gate = manifest.get("gate") or {}
    figures = {str(check.get("name")): check.get("value") for check in gate.get("checks") or []}
    return {
        "target": {"": manifest.get("target")},
        "bytes": {"": manifest.get("bytes")},
        "scores": _flat(manifest.get("scores") or {}),
        "gate": {"passed": gate.get("passed"), "engine": gate.get("engine")} | figures,
        "recipe": _flat(yaml.safe_load(recipe) if recipe else {}),
        "data": manifest.get("data") or {},
        "base": _flat(manifest.get("base") or {}),
    }


def _flat(values: Any, prefix: str = "") -> Record:
    """Nested mappings as dotted names; a list is one value."""
    if not isinstance(values, dict):
        return {prefix: values}
    flat: Record = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return flat
