"""The documents of `qft models` as rich tables."""

from __future__ import annotations

from typing import Any

from rich.console import Group

from qft.views.terminal.table import Facts, Rows, Whole, spaced
from qft.views.words import size

__all__ = ["render_diff", "render_findings", "render_list", "render_version"]

Document = dict[str, Any]


def render_list(document: Document) -> Group:
    """A table for each model."""
    if not document["models"]:
        return Group(Whole(f"{document['registry']}: no models; add one with qft models add"))
    return spaced(*(_versions(name, model) for name, model in document["models"].items()))


def _versions(name: str, model: Document) -> Rows:
    rows = Rows(name, "version", "created", "target", "bytes", "gate", "scores")
    if model["current"] and model["current"] not in model["versions"]:
        rows.add(f"{model['current']} (current)", "", "the base", "", "", "")
    for entry, manifest in model["versions"].items():
        shown = f"{entry} (current)" if entry == model["current"] else entry
        figures = ", ".join(f"{name} {_figure(value)}" for name, value in (manifest["scores"] or {}).items())
        about = (_minute(manifest["created"]), manifest["target"] or "", size(manifest["bytes"]))
        rows.add(shown, *about, _gate(manifest), figures)
    return rows


def render_version(document: Document) -> Group:
    """One version, or the record of a base, and what happened to the model."""
    rows = Facts(f"{document['name']} {document['entry']}")
    for name, value in _about(document["manifest"]).items():
        rows.add(name, Whole(value))
    past = Rows("History", "time", "action", "from", "to", "reason")
    for record in document["history"]:
        forced = " (forced)" if record.get("forced") else ""
        moved = (record["from"] or "", record["to"], record["reason"])
        past.add(_minute(record["time"]), record["action"] + forced, *moved)
    return spaced(rows, past)


def render_diff(document: Document) -> Group:
    """One line for each figure or field."""
    rows = Rows(document["name"], "", document["a"], document["b"], unbroken=True)
    for row in document["rows"]:
        name = f"{row['section']} {row['field']}".rstrip()
        shown = [size(row[side]) if name == "bytes" and row[side] else _figure(row[side]) for side in ("a", "b")]
        rows.add(name, *shown, style="" if row["a"] == row["b"] else "bold")
    return spaced(rows)


def render_findings(document: Document) -> Group:
    """What was hashed; what is wrong is the error."""
    rows = Rows(document["name"], "version", "missing", "changed", "extra", "")
    for entry in document["entries"]:
        counts = [str(len(entry[kind])) for kind in ("missing", "changed", "extra")]
        rows.add(entry["entry"], *counts, "whole" if entry["whole"] else "broken")
    return spaced(rows)


def _about(manifest: Document) -> dict[str, str]:
    base, recipe = manifest.get("base") or {}, manifest.get("recipe") or {}
    told = {
        "created": manifest["created"],
        "target": manifest.get("target"),
        "gate": _gate(manifest) if "gate" in manifest else None,
        "bytes": size(manifest["bytes"]) if "bytes" in manifest else None,
        "files": str(len(manifest["sha256"])) if "sha256" in manifest else None,
        "base": base.get("path"),
        "base commit": base.get("commit"),
        "run": manifest.get("run"),
        "recipe": recipe.get("path"),
    }
    told |= {f"score {name}": _figure(value) for name, value in (manifest.get("scores") or {}).items()}
    data = (manifest.get("data") or {}).items()
    told |= {f"data {i}": f"{path} ({str(digest)[:12]})" for i, (path, digest) in enumerate(data, start=1)}
    return {name: value for name, value in told.items() if value}


def _gate(manifest: Document) -> str:
    verdict = (manifest.get("gate") or {}).get("passed")
    return "not run" if verdict is None else "passed" if verdict else "failed"


def _minute(time: str) -> str:
    """2026-01-31 12:00 of a time in UTC."""
    return time[:16].replace("T", " ")


def _figure(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
