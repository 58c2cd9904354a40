"""Two versions side by side."""

import json
from typing import Any

import yaml

from qft.documents.registry import Difference, Verdict, VersionManifest

ALWAYS = ("target", "bytes", "scores", "gate")
"""Sections told whether or not they differ; recipe, data and base are long, and told where they do."""


def diff(a: VersionManifest, b: VersionManifest) -> list[Difference]:
    """What two manifests say: target, bytes, scores and gate figures, and where recipe, data and base differ."""
    left, right = _sections(a), _sections(b)
    rows = [
        Difference(section=section, field=name, a=left[section].get(name), b=right[section].get(name))
        for section in left
        for name in left[section] | right[section]
    ]
    return [row for row in rows if row.section in ALWAYS or row.a != row.b]


def _sections(manifest: VersionManifest) -> dict[str, dict[str, Any]]:
    gate = manifest.gate or Verdict()
    return {
        "target": {"": manifest.target},
        "bytes": {"": manifest.bytes},
        "scores": dict(manifest.scores or {}),
        "gate": {"passed": gate.passed, "engine": gate.engine} | {check.name: check.value for check in gate.checks},
        "recipe": _flat(_parsed(manifest.recipe.text)) if manifest.recipe else {},
        "data": dict(manifest.data or {}),
        "base": _flat(manifest.base.model_dump() if manifest.base else {}),
    }


def _parsed(text: str) -> Any:
    """The recipe's fields; of what is no recipe the text."""
    try:
        values = yaml.safe_load(text)
        json.dumps(values, default=str)  # one that contains itself has no end
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    return values


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names; a list is one value."""
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return flat
