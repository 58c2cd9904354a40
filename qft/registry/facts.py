"""What is known of an artifact: its export.json, and the run that it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qft.errors import MissingError, RunError
from qft.files import sha256
from qft.registry.shelf import Record

__all__ = ["facts_of"]


def facts_of(artifact: Path, run: Path | None) -> Record:
    """The facts that `add` takes: from export.json in the artifact's folder, if there is one, and from a run's
    manifest.json, recipe.yaml and report.json. Raises MissingError if `run` is no run, RunError if a file cannot be
    read or the two tell of different bases."""
    exported = _read(artifact / "export.json")
    facts = {name: exported.get(name) for name in ("target", "base", "gate", "sha256")}
    if facts["gate"] and not facts["sha256"]:
        raise RunError(f"{artifact / 'export.json'}: has a verdict and no sha256, so nothing says of which files it is")
    if run is None:
        return facts
    manifest = _read(run / "manifest.json")
    if not manifest:
        raise MissingError(f"{run}: is no run of qft")
    base = manifest.get("base")
    if facts["base"] and base and facts["base"] != base:
        raise RunError(f"{run}: its base is not the one in {artifact / 'export.json'}; name the run that was exported")
    recipe, scores = _recipe(run / "recipe.yaml"), _scores(_read(run / "report.json"))
    known = {"base": base or facts["base"], "data": manifest.get("data"), "run": str(run.resolve())}
    return facts | known | {"recipe": recipe, "scores": scores}


def _recipe(path: Path) -> Record | None:
    if not path.is_file():
        return None
    return {"path": str(path.resolve()), "sha256": sha256(path), "text": path.read_text("utf-8")}


def _scores(report: Record) -> dict[str, float] | None:
    """Of a training: on its held-out rows, after it. Of a calibration: of the last attempt."""
    if report.get("kind") == "calibration":
        attempt: Record = report["attempts"][-1]
        names = ("perplexity", "perplexity_change", "kl_mean", "top1_agreement")
        figures = {name: _number(attempt.get(name)) for name in names}
    else:
        attempt = (report.get("eval") or {}).get("after") or {}
        figures = {name: attempt.get(name) for name in ("loss", "perplexity")}
    told = figures | (attempt.get("scores") or {})
    return {name: value for name, value in told.items() if value is not None} or None


def _number(value: Any) -> float | None:
    """A figure, or the middle of one that comes with an interval."""
    found: float | None = value.get("value") if isinstance(value, dict) else value
    return found


def _read(path: Path) -> Record:
    """A JSON object; empty if the file is not there."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise RunError(f"{path}: is no JSON object")
    return found
