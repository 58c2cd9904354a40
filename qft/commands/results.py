"""What `qft eval` writes into its folder: eval.json, report.html, and each target's answers as JSONL."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from qft.documents.evaluation import EvalDocument
from qft.documents.recorded import EVALUATION
from qft.errors import RecipeError, RunError
from qft.files import write_text
from qft.measure.scores import Answer, as_jsonl
from qft.model.target import split_variant
from qft.run.folder import Run
from qft.views.html.page import evaluation_page, side_by_side
from qft.views.marks import PAGE, is_marked

DOCUMENT, REPORT, ANSWERS = EVALUATION
LONGEST = 200
"""Bytes of a target's name that a file's may have."""


def default_out(names: Sequence[str]) -> Path | None:
    """Where results go unless the user says: into the first run among the targets.
    Raises RecipeError for a variant that is none."""
    runs = (Path(split_variant(name)[0]) for name in names)
    return next((run / "eval" for run in runs if Run(run).manifest()), None)


def require_replaceable(out: Path, names: Sequence[str], data: str | None) -> None:
    """Raise RunError for a run's folder, and for a file that is to be written, and is there and not from `qft eval`;
    RecipeError for one that is to be read."""
    if Run(out).manifest():
        raise RunError(f"{out}: is a run, whose own report is there; leave --out away, or give another folder")
    for name, is_own in {DOCUMENT: _is_document, REPORT: lambda path: is_marked(path, PAGE)}.items():
        _require_own(out / name, is_own)
    for path in answer_files(out, names).values():
        if data and Path(data).resolve() == path.resolve():
            raise RecipeError(f"--data {data}: is where the answers are written; give another --out")
        _require_own(path, _are_answers)


def write_results(
    out: Path, document: EvalDocument, answers: Mapping[str, Sequence[Answer]], place: Callable[[int, int], str]
) -> None:
    """All is made before anything is written, so that what cannot be leaves the folder as it was."""
    figures = json.dumps(document.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False)
    page = evaluation_page(document, side_by_side(answers, place))
    files = answer_files(out, [target.name for target in document.targets])
    for name, given in answers.items():
        write_text(files[name], as_jsonl(given, place))
    write_text(out / REPORT, page)
    write_text(out / DOCUMENT, figures + "\n")


def answer_files(out: Path, names: Sequence[str]) -> dict[str, Path]:
    """Of each target, by its name, of which a file's cannot have all: then its hash tells it from others."""
    plain = {name: "".join(c if c.isalnum() or c in "-._@" else "_" for c in name) for name in names}
    return {
        name: out / ANSWERS / f"{text if _is_unique(text, plain) else _shortened(name, text)}.jsonl"
        for name, text in plain.items()
    }


def _is_unique(text: str, plain: Mapping[str, str]) -> bool:
    return len(text.encode()) <= LONGEST and list(plain.values()).count(text) == 1


def _shortened(name: str, text: str) -> str:
    return f"{text.encode()[-LONGEST:].decode(errors='ignore')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _require_own(path: Path, is_own: Callable[[Path], bool]) -> None:
    if path.exists() and not (path.is_file() and (is_own(path) or not path.stat().st_size)):
        raise RunError(f"{path}: is not from `qft eval`, so it is not replaced; move it, or give another --out")


def _is_document(path: Path) -> bool:
    with suppress(OSError, ValueError):
        document = json.loads(path.read_bytes())
        return isinstance(document, dict) and document.get("kind") == "eval" and "targets" in document
    return False


def _are_answers(path: Path) -> bool:
    with suppress(OSError, ValueError), path.open("rb") as stream:
        first = json.loads(stream.readline())
        return isinstance(first, dict) and {"place", *(field.name for field in fields(Answer))} <= first.keys()
    return False
