"""What --overwrite takes the place of: an earlier run, which waits in OUTPUT_DIR/replaced-N, itself a run folder, until
the new one is complete."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from qft.documents.export import ExportMark, export_in
from qft.documents.recorded import EVALUATION, RESULTS, SIDE, lies_beside, lies_beside_work
from qft.files import remove_folder
from qft.run.checkpoint import beside_all
from qft.run.lock import HELD, LOCK, require_free

MANIFEST = "manifest.json"
BEGINNING = (MANIFEST, "recipe.yaml", "plan.json")
"""What a run writes first."""
OWN = (
    *BEGINNING, "checkpoints", "adapter", "model", "work", "calibration.jsonl", "events", "rows.jsonl", "answers",
    "eval-before.json", "eval-after.json", "report.json", "report.html", "eval", "export",
)  # fmt: skip
"""What runs and the commands on them write. Anything else is moved with it and not deleted."""


def replaced(folder: Path) -> list[Path]:
    """The earlier runs that wait in it, oldest first."""
    return [path for path in _numbered(folder) if (path / MANIFEST).exists()]


def cut_off(folder: Path) -> Path | None:
    """The earlier run of which a killed command had moved some and begun nothing new."""
    waiting = [] if (folder / MANIFEST).exists() else replaced(folder)
    return waiting[-1] if waiting else None


def remove_empty(folder: Path) -> None:
    """Remove what a kill left of folders for earlier runs, before anything was in them or once nothing was any more."""
    for path in _numbered(folder):
        with suppress(OSError):  # of one that is not empty
            path.rmdir()


@contextmanager
def replacing(folder: Path) -> Iterator[Path | None]:
    """Move the run in `folder` aside, if there is one; put it back unless the body begins a new one."""
    if not (folder / MANIFEST).exists():
        yield None
        return
    require_free(*(path for path in folder.iterdir() if path.is_dir()))  # an export of the run, say
    aside = folder / f"replaced-{max(map(_number, _numbered(folder)), default=0) + 1}"
    aside.mkdir()
    try:
        for path in _manifest_first(folder):  # without one, what was moved is put back
            os.replace(path, aside / path.name)
        yield aside
    except BaseException:
        restore(folder, aside)
        raise


def restore(folder: Path, aside: Path) -> None:
    """Put an earlier run back in its place."""
    for name in BEGINNING:
        if (aside / name).exists():
            (folder / name).unlink(missing_ok=True)
    for path in reversed(_manifest_first(aside)):
        os.replace(path, folder / path.name)
    aside.rmdir()


def remove(aside: Path) -> list[Path]:
    """Delete an earlier run, but for what it holds that qft did not write. Returns what is left."""
    exports = aside / "export"
    artifacts = [] if exports.is_symlink() else [*exports.glob("*")]
    marks = {path: mark for path in artifacts if (mark := export_in(path))}
    others = [path for path in artifacts if path not in marks]
    left = [path for path in aside.iterdir() if path.name not in OWN] + others
    stays = _stays(aside, marks)
    for path in [*artifacts, *reversed(_manifest_first(aside))]:  # the manifest last: until then, it is a run to remove
        if path in left or (path == exports and any(kept.is_relative_to(exports) for kept in left)):
            continue
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            left += remove_folder(path, stays.get(path, lambda name: False))
    if not left:
        aside.rmdir()
    return left


def _stays(aside: Path, marks: Mapping[Path, ExportMark]) -> dict[Path, Callable[[str], bool]]:
    """Of qft's own folders, whether a file, by its path in one, is somebody else's: their notes, say."""
    checkpoints, results = aside / "checkpoints", [aside / name for name in RESULTS]
    stays = {checkpoints: beside_all(checkpoints)} | dict.fromkeys(results, lies_beside)
    stays[aside / "work"] = lies_beside_work
    stays[aside / "events"] = lambda name: "tfevents" not in name
    stays[aside / "answers"] = lambda name: not name.endswith(".jsonl")
    *files, answers = EVALUATION
    stays[aside / "eval"] = lambda name: name not in files and not fnmatch(name, f"{answers}/*.jsonl")
    return stays | {path: _beside_export(mark) for path, mark in marks.items()}


def _beside_export(mark: ExportMark) -> Callable[[str], bool]:
    made = {*mark.sha256, *SIDE}
    return lambda name: name not in made


def _manifest_first(folder: Path) -> list[Path]:
    """What lies in a run's folder, but for locks and runs that it replaced."""
    others = {*_numbered(folder), folder / LOCK, folder / HELD}
    return sorted((path for path in folder.iterdir() if path not in others), key=lambda path: path.name != MANIFEST)


def _numbered(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("replaced-*") if path.name.removeprefix("replaced-").isdecimal())
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("replaced-"))
