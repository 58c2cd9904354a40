"""One model's folder in a registry: what lies where, read and locked; it decides nothing.

v1/artifact/     the files of a version, read-only
v1/manifest.json recipe, data and base hashes, scores, gate verdict, bytes and the SHA-256 of every file
original-HASH/   the base that versions were made from, by what its files hash to: manifest.json and nothing else
current          a relative symlink to one of them
history.jsonl    one line for each add, promote and rollback; lines are added and never changed
.*               locks, and what a killed command left behind
"""

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from qft.documents.registry import Event, VersionManifest
from qft.errors import MissingError, RecipeError, RunError
from qft.files import now, write_text

ORIGINAL = "original"
MANIFEST, ARTIFACT = "manifest.json", "artifact"
LOCK, ADD_LOCK = ".lock", ".add.lock"
"""Of history and pointer, held for moments; of adds, held while files are copied, so that no rollback waits for it."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
VERSION = re.compile(r"v([1-9][0-9]*)", re.ASCII)
ENTRY = re.compile(r"v[1-9][0-9]*|original-[0-9a-f]{12}", re.ASCII)

Action = Literal["add", "promote", "rollback"]


@dataclass(frozen=True)
class Shelf:
    """The versions of one model."""

    folder: Path

    def numbers(self) -> list[int]:
        """Of the versions that are there, in order."""
        matches = [VERSION.fullmatch(path.name) for path in self.folder.glob("v*")]
        return sorted(int(match[1]) for match in matches if match)

    def current(self) -> str | None:
        """vN or original-HASH; None before the first promote. Raises RunError if it is no pointer of a registry."""
        pointer = self.folder / "current"
        if not os.path.lexists(pointer):
            return None
        entry = os.readlink(pointer) if pointer.is_symlink() else ""
        if not ENTRY.fullmatch(entry):
            raise RunError(f"{pointer}: is no link to a version; remove it and promote one")
        return entry

    def manifest(self, entry: str) -> VersionManifest:
        """Raises MissingError if the version is not there, RunError if its manifest cannot be read."""
        path = self.folder / entry / MANIFEST
        if not path.parent.is_dir():
            there = ", ".join(f"v{number}" for number in self.numbers()) or "none"
            raise MissingError(f"{self.folder}: has no {entry}; versions: {there}")
        try:
            return VersionManifest.model_validate_json(path.read_bytes())
        except (OSError, ValueError):
            raise RunError(f"{path}: cannot be read; see `qft models verify {self.folder.name}`") from None

    def history(self) -> list[Event]:
        """Every add, promote and rollback, oldest first. Raises RunError for a line that is none of them."""
        events = []
        for number, line in enumerate(self._history_text().splitlines(), start=1):
            try:
                events.append(Event.model_validate_json(line))
            except ValidationError:
                raise RunError(f"{self.folder / 'history.jsonl'}:{number}: is no record of a registry") from None
        return events

    def append(self, action: Action, start: str | None, to: str, reason: str, **more: Any) -> None:
        """Add one line to the history. The file is replaced whole: a kill within an append would leave half a line."""
        event = Event(time=now(), action=action, start=start, to=to, reason=reason, **more)
        line = json.dumps(event.model_dump(mode="json", exclude_defaults=True), ensure_ascii=False) + "\n"
        write_text(self.folder / "history.jsonl", self._history_text() + line)

    def point(self, entry: str) -> None:
        """Make `entry` current, at once. Raises RunError where the file system has no symlinks."""
        temporary = self.folder / f".current.{secrets.token_hex(8)}"
        try:
            os.symlink(entry, temporary)
        except OSError as error:
            raise RunError(f"{self.folder}: a registry needs symlinks: {error.strerror}") from None
        os.replace(temporary, self.folder / "current")
        flush(self.folder)

    @contextmanager
    def locked(self, name: str, *, wait: bool = True) -> Iterator[None]:
        """Hold LOCK or ADD_LOCK, waiting for it, or else raising BlockingIOError if another has it. The system lets go
        of it when the process ends, however it ends."""
        import fcntl  # Unix only; here, so that the help is printed anywhere

        with (self.folder / name).open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield

    def busy(self) -> bool:
        """Whether a version is being added at this moment."""
        if not (self.folder / ADD_LOCK).exists():
            return False
        try:
            with self.locked(ADD_LOCK, wait=False):
                return False
        except BlockingIOError:
            return True

    def _history_text(self) -> str:
        try:
            return (self.folder / "history.jsonl").read_text("utf-8")
        except FileNotFoundError:
            return ""


def flush(path: Path) -> None:
    """Have a file, or the entries of a folder, on disk and not only in the system's memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_shelf(registry: Path, name: str, *, new: bool = False) -> Shelf:
    """The model `name`. Raises RecipeError for a name that could lead elsewhere, MissingError if it must be there
    (unless `new`) and is not."""
    if not NAME.fullmatch(name):
        raise RecipeError(f"{name!r}: a model's name is 1 to 64 of A-Z a-z 0-9 . _ - and begins with a letter or digit")
    if not new and not _is_shelf(registry / name):
        there = ", ".join(names(registry)) or "none"
        raise MissingError(f"{registry}: has no model {name}; models: {there}")
    return Shelf(registry / name)


def names(registry: Path) -> list[str]:
    """The models of a registry, by name; none if there is no such folder."""
    return sorted(path.name for path in registry.glob("*") if NAME.fullmatch(path.name) and _is_shelf(path))


def _is_shelf(folder: Path) -> bool:
    return bool(Shelf(folder).numbers()) or (folder / "history.jsonl").exists()
