"""Whose a run folder is: one process's at a time, of one kind of run, and never that of what a new one reads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qft.disk import disk_failures
from qft.documents.manifest import Work
from qft.errors import MissingError, RunError
from qft.files import TEMPORARY, remove_leftovers
from qft.progress import View
from qft.recipe import LoadedRecipe
from qft.recipe.section import Problem
from qft.run.checkpoint import checkpoints_in
from qft.run.folder import Run, no_checkpoint
from qft.run.lock import HELD, LOCK, locked, require_free
from qft.run.replaced import cut_off, remove, remove_empty, replaced, restore
from qft.run.resume import refuse_to_resume

COMMANDS: dict[Work, str] = {"training": "qft train", "calibration": "qft calibrate"}
FEW = 10_000
"""Files of an input's folder that are looked at for links."""


@contextmanager
def claimed(loaded: LoadedRecipe, work: Work, view: View, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Hold output_dir for one run. Afterwards earlier runs that it replaced are removed, if it is complete, or else it
    is said where they are.

    Raises RunError for a folder that forbids it, BusyError if a living process is at work there."""
    folder = Path(loaded.recipe.output_dir)
    with disk_failures(folder):
        require_free(folder)
        _check(loaded, folder, work, resume=resume, overwrite=overwrite)  # before a lock is written into it
    with locked(folder, COMMANDS[work]):
        remove_empty(folder)
        if aside := cut_off(folder):
            restore(folder, aside)
        _check(loaded, folder, work, resume=resume, overwrite=overwrite)
        for name in ("answers", "checkpoints", "events", "work"):
            remove_leftovers(folder / name)
        try:
            yield
        finally:
            _settle(Run(folder), view)


def _check(loaded: LoadedRecipe, folder: Path, work: Work, *, resume: bool, overwrite: bool) -> None:
    """Whether a run may begin here, asked before any work. Raises RunError."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: output_dir is a file; give a folder")
    run = Run(cut_off(folder) or folder)
    if resume:
        _require_resumable(run, work)
    elif _contents(folder):
        if not overwrite:
            raise RunError(f"{folder}: output_dir is not empty; use --resume, --overwrite, or another output_dir")
        if not run.manifest():
            _require_undamaged(run)
            raise RunError(f"{folder}: output_dir is not empty and not a run of qft, so it is not overwritten")
        _require_work(run, work)
        refuse_to_resume(loaded, _inputs_within(loaded, folder))


def _require_resumable(run: Run, work: Work) -> None:
    if not run.manifest():
        _require_undamaged(run)
        raise RunError(f"{run.folder}: there is no run to resume; leave --resume away to start one")
    _require_work(run, work)
    if not checkpoints_in(run.checkpoints) and not run.work.is_dir():
        raise RunError(no_checkpoint(run))


def _require_undamaged(run: Run) -> None:
    """Raise DamagedError or RunError for what would be a run, had it its manifest."""
    if not isinstance(damaged := run.no_run(), MissingError):
        raise damaged


def _require_work(run: Run, work: Work) -> None:
    if (other := run.kind_of_work()) != work:
        what = f"holds a {other}" if other else "holds a run that does not say of what it is"
        raise RunError(f"{run.folder}: output_dir {what}, which `{COMMANDS[work]}` does not touch; give another folder")


def _contents(folder: Path) -> list[Path]:
    """What lies in it, but for what qft itself leaves there when it is killed."""
    there = folder.iterdir() if folder.is_dir() else ()
    return [path for path in there if path.name not in (LOCK, HELD) and not TEMPORARY.fullmatch(path.name)]


def _settle(run: Run, view: View) -> None:
    """Remove what was replaced by a run that is complete; else say where it is."""
    manifest = run.manifest()
    for aside in replaced(run.folder):
        if manifest is None or manifest.status != "complete":
            view.note(f"The earlier run is kept in {aside} until this one is complete")
        elif left := remove(aside):
            view.note(f"Of the earlier run, left as qft did not write it: {', '.join(map(str, left))}")


def _inputs_within(loaded: LoadedRecipe, folder: Path) -> Iterator[Problem]:
    """Yield the fields that name what lies in the folder, or is a link into it."""
    text = "{} is read for the new run and lies in output_dir, which --overwrite replaces; move it, or write elsewhere"
    for field, value in _texts(loaded.recipe.model_dump(mode="json", exclude={"output_dir"})):
        if os.path.isabs(value) and (found := _within(Path(value), folder)):
            yield field, text.format(found)
    for file in dict.fromkeys(where.rpartition(":")[0] for where in loaded.tree.where.values()):
        if os.path.isfile(file) and (found := _within(Path(file), folder)):
            yield "output_dir", text.format(found)


def _texts(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, f"{field}.{name}" if field else str(name))


def _within(path: Path, folder: Path) -> Path | None:
    """What of an input lies in the folder: itself, or a file of its folder that is a link there."""
    root = folder.resolve()
    if not os.path.lexists(path):
        return None
    if any(place.is_relative_to(root) for place in (path.resolve(), path.parent.resolve() / path.name)):
        return path
    files = (file for _, file in zip(range(FEW), path.rglob("*"), strict=False)) if path.is_dir() else ()
    links = (file for file in files if file.is_symlink() and not file.parent.resolve().is_relative_to(root))
    return next((link for link in links if link.resolve().is_relative_to(root)), None)
