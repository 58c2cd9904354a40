"""What --overwrite takes the place of: an earlier run, which waits in OUTPUT_DIR/replaced-N, itself a run folder, until
the new one is complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qft.documents.export import export_in
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
    return sorted(folder.glob("replaced-[0-9]*"), key=lambda path: int(path.name.rpartition("-")[2]))


def cut_off(folder: Path) -> Path | None:
    """The earlier run of which a killed command had moved some and begun nothing new."""
    waiting = replaced(folder)
    there = waiting and (waiting[-1] / MANIFEST).exists() and not (folder / MANIFEST).exists()
    return waiting[-1] if there else None


@contextmanager
def replacing(folder: Path) -> Iterator[Path | None]:
    """Move the run in `folder` aside, if there is one; put it back unless the body begins a new one."""
    if not (folder / MANIFEST).exists():
        yield None
        return
    require_free(*(path for path in folder.iterdir() if path.is_dir()))  # an export of the run, say
    aside = folder / f"replaced-{max((int(p.name.rpartition('-')[2]) for p in replaced(folder)), default=0) + 1}"
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
    parts = [*aside.iterdir(), *([] if exports.is_symlink() else exports.glob("*"))]
    left = [path for path in parts if not (export_in(path) if path.parent == exports else path.name in OWN)]
    for path in parts:
        if path not in left and not (path == exports and any(other.parent == exports for other in left)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink()
    if not left:
        aside.rmdir()
    return left


def _manifest_first(folder: Path) -> list[Path]:
    """What lies in a run's folder, but for locks and runs that it replaced."""
    paths = (path for path in folder.iterdir() if path.name not in (LOCK, HELD) and path not in replaced(folder))
    return sorted(paths, key=lambda path: path.name != MANIFEST)
