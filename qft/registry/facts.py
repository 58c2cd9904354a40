"""What is known of an artifact: its export.json, and the run that it comes from."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qft.documents.manifest import Manifest
from qft.documents.recorded import record_of, record_of_run
from qft.documents.registry import RecipeText, VersionManifest
from qft.errors import MissingError, RunError
from qft.files import read_file, sha256

Record = dict[str, Any]


def facts_of(artifact: Path, run: Path | None) -> VersionManifest:
    """The facts that `add` takes: from export.json in the artifact's folder, if there is one, and from a run's
    manifest.json, recipe.yaml and report.json. Raises MissingError if `run` is no run, RunError if a file cannot be
    read or the two tell of different bases, DamagedError if the run's are not as it wrote them."""
    exported = _read(artifact / "export.json")
    if not exported and (record := record_of(artifact)):
        exported = {"sha256": record.below(artifact)}
    facts = _told(artifact, {name: exported.get(name) for name in ("target", "base", "gate", "sha256")})
    if facts.gate and not facts.sha256:
        raise RunError(f"{artifact / 'export.json'}: has a verdict and no sha256, so nothing says of which files it is")
    if run is None:
        return facts
    manifest = _manifest(run)
    if record := record_of_run(run):
        record.part("recipe.yaml").require_whole()
        record.part("report.json").require_whole()
    if facts.base and manifest.base and facts.base != manifest.base:
        raise RunError(f"{run}: its base is not the one in {artifact / 'export.json'}; name the run that was exported")
    known = {
        "base": manifest.base or facts.base,
        "data": manifest.data,
        "run": str(run.resolve()),
        "recipe": _recipe(run / "recipe.yaml"),
        "scores": _told_scores(run / "report.json"),
    }
    return facts.model_copy(update=known)


def _told(artifact: Path, values: Record) -> VersionManifest:
    try:
        return VersionManifest.model_validate(values)
    except ValidationError as error:
        odd = ", ".join(dict.fromkeys(str(problem["loc"][0]) for problem in error.errors()))
        raise RunError(f"{artifact}: what is told of its {odd} is no mapping of names to values") from None


def _manifest(run: Path) -> Manifest:
    path = run / "manifest.json"
    if not (record := _read(path)):
        raise MissingError(f"{run}: is no run of qft")
    try:
        return Manifest.model_validate(record)
    except ValidationError as error:
        raise RunError(f"{path}: cannot be read: {error.errors()[0]['msg']}") from None


def _recipe(path: Path) -> RecipeText | None:
    if not path.is_file():
        return None
    try:
        return RecipeText(path=str(path.resolve()), sha256=sha256(path), text=path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None


def _told_scores(path: Path) -> dict[str, float] | None:
    report = _read(path)
    try:
        return VersionManifest.model_validate({"scores": _scores(report)}).scores
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise RunError(f"{path}: is no report of a run, and has no scores; restore it, or remove it") from None


def _scores(report: Record) -> dict[str, float] | None:
    """Of a training: on its held-out rows, after it. Of a calibration: of the last attempt."""
    if report.get("kind") == "calibration":
        attempt: Record = report["attempts"][-1]
        names = ("perplexity", "perplexity_change", "kl_mean", "top1_agreement")
        figures = {name: _number(attempt.get(name)) for name in names}
    else:
        attempt = (report.get("eval") or {}).get("after") or {}
        figures = {name: attempt.get(name) for name in ("loss", "perplexity")}
    scores = figures | (attempt.get("scores") or {})
    return {name: value for name, value in scores.items() if value is not None} or None


def _number(value: Any) -> float | None:
    """A figure, or the middle of one that comes with an interval."""
    figure: float | None = value.get("value") if isinstance(value, dict) else value
    return figure


def _read(path: Path) -> Record:
    """A JSON object; empty if the file is not there."""
    try:
        record = json.loads(read_file(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise RunError(f"{path}: is no JSON object")
    return record
