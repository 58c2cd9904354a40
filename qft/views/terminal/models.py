"""The documents of `qft models` as rich tables."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType

from qft.documents import registry as documents
from qft.views.terminal.table import Facts, Rows, Whole, spaced
from qft.views.words import size


def render_list(document: documents.RegistryListing) -> Group:
    """A table for each model."""
    if not document.models:
        return Group(Whole(f"{document.registry}: no models; add one with qft models add"))
    return spaced(*(part for name, model in document.models.items() for part in _model(name, model)))


def _model(name: str, model: documents.ModelVersions) -> list[RenderableType]:
    return [_versions(name, model), *_told(model.problems)]


def _versions(name: str, model: documents.ModelVersions) -> Rows:
    rows = Rows(name, "version", "created", "target", "bytes", "gate", "scores")
    if model.current and not model.current.startswith("v"):
        rows.add(f"{model.current} (current)", "", "the base", "", "", "")
    for entry, manifest in model.versions.items():
        shown = f"{entry} (current)" if entry == model.current else entry
        figures = ", ".join(f"{name} {_figure(value)}" for name, value in (manifest.scores or {}).items())
        about = (_minute(manifest.created), manifest.target or "", size(manifest.bytes or 0))
        rows.add(shown, *about, _gate(manifest), figures)
    return rows


def _told(problems: Sequence[str]) -> Iterator[Whole]:
    """What is damaged, on lines that are never wrapped: there are commands in them."""
    return (Whole(text, "bold") for text in problems)


def render_version(document: documents.VersionDetails) -> Group:
    """One version, or the record of a base, and what happened to the model."""
    rows = Facts(f"{document.name} {document.entry}")
    for name, value in (_about(document.manifest) if document.manifest else {}).items():
        rows.add(name, Whole(value))
    past = Rows("History", "time", "action", "from", "to", "reason")
    for event in document.history:
        forced = " (forced)" if event.forced else ""
        past.add(_minute(event.time), event.action + forced, event.start or "", event.to, event.reason)
    return spaced(rows, past, *_told(document.problems))


def render_diff(document: documents.VersionComparison) -> Group:
    """One line for each figure or field."""
    rows = Rows(document.name, "", document.a, document.b, unbroken=True)
    for row in document.rows:
        name = f"{row.section} {row.field}".rstrip()
        shown = [size(value) if name == "bytes" and value else _figure(value) for value in (row.a, row.b)]
        rows.add(name, *shown, style="" if row.a == row.b else "bold")
    return spaced(rows)


def render_findings(document: documents.VersionVerification) -> Group:
    """What was hashed; what is wrong is the error."""
    rows = Rows(document.name, "version", "missing", "changed", "unreadable", "extra", "")
    for finding in document.entries:
        counts = [str(len(names)) for names in (finding.missing, finding.changed, finding.unreadable, finding.extra)]
        rows.add(finding.entry, *counts, "whole" if finding.whole else "broken")
    return spaced(rows)


def _about(manifest: documents.VersionManifest) -> dict[str, str]:
    base, recipe = manifest.base, manifest.recipe
    facts = {
        "created": manifest.created,
        "target": manifest.target,
        "gate": _gate(manifest) if manifest.kind == "version" else None,
        "bytes": size(manifest.bytes) if manifest.bytes is not None else None,
        "files": str(len(manifest.sha256)) if manifest.sha256 is not None else None,
        "base": base.path if base else None,
        "base commit": base.commit if base else None,
        "run": manifest.run,
        "recipe": recipe.path if recipe else None,
    }
    facts |= {f"score {name}": _figure(value) for name, value in (manifest.scores or {}).items()}
    data = (manifest.data or {}).items()
    facts |= {f"data {i}": f"{path} ({str(digest)[:12]})" for i, (path, digest) in enumerate(data, start=1)}
    return {name: value for name, value in facts.items() if value}


def _gate(manifest: documents.VersionManifest) -> str:
    verdict = manifest.gate.passed if manifest.gate else None
    return "not run" if verdict is None else "passed" if verdict else "failed"


def _minute(time: str) -> str:
    """2026-01-31 12:00 of a time in UTC."""
    return time[:16].replace("T", " ")


def _figure(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
