"""One model's folder in a registry: what lies where, read and locked; it decides nothing.

v1/artifact/     the files of a version, read-only
v1/manifest.json recipe, data and base hashes, scores, gate verdict, bytes and the SHA-256 of every file
original-HASH/   the base that versions were made from, by what its files hash to: manifest.json and nothing else
current          a relative symlink to one of them
history.jsonl    one line for each add, promote and rollback; lines are added and never changed
.*               locks, and what a killed command left behind
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from qft.documents.registry import Event, VersionManifest
from qft.errors import MissingError, QftError, RecipeError, RunError
from qft.files import atomic_file, now, read_file

ORIGINAL = "original"
HISTORY = "history.jsonl"
MANIFEST, ARTIFACT = "manifest.json", "artifact"
LOCK, ADD_LOCK = ".lock", ".add.lock"
"""Of history and pointer, held for moments; of adds, held while files are copied, so that no rollback waits for it."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
VERSION = re.compile(r"v([1-9][0-9]{0,17})", re.ASCII)
ENTRY = re.compile(r"v[1-9][0-9]{0,17}|original-[0-9a-f]{12}", re.ASCII)

Action = Literal["add", "promote", "rollback"]


@dataclass(frozen=True)
class History:
    """What is known of what was done to a model."""

    events: list[Event]
    """Every add, promote and rollback, oldest first."""
    damaged: list[str]
    """A sentence for each line that is none of them."""
    cut: bool = False
    """Whether one of those comes after the last of the events that move `current`."""
    numbers: tuple[int, ...] = ()
    """Of versions that a damaged line names."""

    @property
    def moves(self) -> list[Event]:
        return [event for event in self.events if event.action != "add"]

    @property
    def recorded(self) -> str | None:
        """What is current by the last promote or rollback."""
        return self.moves[-1].to if self.moves else None

    def add_of(self, entry: str) -> Event | None:
        return next((event for event in self.events if (event.action, event.to) == ("add", entry)), None)


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
        entry = os.path.normpath(os.readlink(pointer)) if pointer.is_symlink() else ""
        if not ENTRY.fullmatch(entry):
            back = self.say_back()
            raise RunError(f"{pointer}: is no link to a version{f'; `{back}` makes it one' if back else ''}")
        return entry

    def leads_to(self) -> str | None:
        """What is current and there; None if nothing is, or `current` is damaged."""
        with suppress(RunError):
            entry = self.current()
            return entry if entry and (self.folder / entry).is_dir() else None
        return None

    def manifest(self, entry: str) -> VersionManifest:
        """Raises MissingError if the version is not there, RunError if its manifest cannot be read."""
        path = self.folder / entry / MANIFEST
        if not os.path.lexists(path.parent):
            there = ", ".join(f"v{number}" for number in self.numbers()) or "none"
            raise MissingError(f"{self.folder}: has no {entry}; versions: {there}")
        try:
            return VersionManifest.model_validate_json(read_file(path))
        except (OSError, ValueError):
            raise RunError(f"{path}: cannot be read; see `{self.say('verify')}`") from None

    def history(self) -> list[Event]:
        """Every add, promote and rollback, oldest first. Raises RunError for a line that is none of them."""
        found = self.read_history()
        if found.damaged:
            raise RunError(found.damaged[0])
        return found.events

    def read_history(self) -> History:
        """The same, and what is damaged of it."""
        path = self.folder / HISTORY
        try:
            content = read_file(path)
        except FileNotFoundError:
            return History([], [])
        except OSError as error:
            said = f"{path}: cannot be read: {error.strerror}; the next change moves it aside and begins another"
            return History([], [said], cut=True)
        events, damaged, cut = [], {}, False
        for number, line in enumerate(content.split(b"\n"), start=1):
            if event := _event(line):
                events.append(event)
                cut = cut and event.action == "add"
            elif line.strip():
                damaged[number], cut = line, True
        texts = [f"{path}:{number}: is no record of a registry; remove the line, if it cannot be restored"
                 for number in damaged]  # fmt: skip
        named = re.findall(rb'"v([1-9][0-9]{0,17})"', b"".join(damaged.values()))
        return History(events, texts, cut, tuple(map(int, named)))

    def append(self, action: Action, start: str | None, to: str, reason: str, **more: Any) -> None:
        """Add one line to the history. The file is replaced whole: a kill within an append would leave half a line.
        What is there stays, damaged or not."""
        said = reason.encode("utf-8", "replace").decode()  # as it comes from a command line, it may be no text
        event = Event(time=now(), action=action, start=start, to=to, reason=said, **more)
        line = json.dumps(event.model_dump(mode="json", exclude_defaults=True), ensure_ascii=False) + "\n"
        path = self.folder / HISTORY
        before = read_file(path) if path.exists() else b""
        ended = before if before.endswith(b"\n") or not before else before + b"\n"
        with atomic_file(path) as temporary:
            temporary.write_bytes(ended + line.encode())

    def clear_history(self) -> None:
        """Move aside what is in the place of the history and cannot be read."""
        try:
            read_file(self.folder / HISTORY)
        except FileNotFoundError:
            pass
        except OSError:
            self.move_aside(self.folder / HISTORY)

    def move_aside(self, path: Path) -> None:
        """Rename what is in the way to NAME.damaged, or NAME.damaged-2 and so on."""
        names = (f"{path.name}.damaged{f'-{number}' if number > 1 else ''}" for number in count(1))
        os.rename(path, next(each for name in names if not os.path.lexists(each := path.with_name(name))))

    def say(self, command: str, *more: str) -> str:
        """A command line of `qft models` for this model."""
        elsewhere = () if self.folder.parent == Path("models") else ("--registry", str(self.folder.parent))
        return shlex.join(["qft", "models", command, self.folder.name, *more, *elsewhere])

    def say_back(self) -> str:
        """The command line that leads `current` to what it was, or else to the newest version; empty without one."""
        recorded = self.read_history().recorded
        manifests = {f"v{number}": self._readable(f"v{number}") for number in reversed(self.numbers())}
        there = {entry: manifest for entry, manifest in manifests.items() if manifest}
        if recorded and (recorded in there or self._readable(recorded)):
            return self.say("rollback", "--to", recorded if recorded in there else ORIGINAL)
        passed = [entry for entry, manifest in there.items() if manifest.gate and manifest.gate.passed]
        if passed:
            return self.say("promote", passed[0])
        return self.say("promote", next(iter(there)), "--force") if there else ""

    def _readable(self, entry: str) -> VersionManifest | None:
        with suppress(QftError):
            return self.manifest(entry)
        return None

    def point(self, entry: str) -> None:
        """Make `entry` current, at once. Raises RunError where the file system has no symlinks."""
        temporary = self.folder / f".current.{secrets.token_hex(8)}"
        try:
            os.symlink(entry, temporary)
        except OSError as error:
            raise RunError(f"{self.folder}: a registry needs symlinks: {error.strerror}") from None
        pointer = self.folder / "current"
        if pointer.is_dir() and not pointer.is_symlink():
            self.move_aside(pointer)
        os.replace(temporary, pointer)
        flush(self.folder)

    @contextmanager
    def locked(self, name: str, *, wait: bool = True) -> Iterator[None]:
        """Hold LOCK or ADD_LOCK, waiting for it, or else raising BlockingIOError if another has it. The system lets go
        of it when the process ends, however it ends."""
        import fcntl  # Unix only; here, so that the help is printed anywhere

        handle = self._lock_handle(name)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(handle)

    def _lock_handle(self, name: str) -> int:
        """Of the lock's file; where something else is in its place, of a folder that every command then takes."""
        path = self.folder / name
        if path.is_file() or not os.path.lexists(path):
            for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):
                with suppress(PermissionError):
                    return os.open(path, flags, 0o644)
        return os.open(self.folder if name == ADD_LOCK else self.folder.parent, os.O_RDONLY)

    def busy(self) -> bool:
        """Whether a version is being added at this moment."""
        if not (self.folder / ADD_LOCK).exists():
            return False
        try:
            with self.locked(ADD_LOCK, wait=False):
                return False
        except BlockingIOError:
            return True


def _event(line: bytes) -> Event | None:
    try:
        event = Event.model_validate_json(line)
    except ValueError:
        return None
    known = ENTRY.fullmatch(event.to) and (event.start is None or ENTRY.fullmatch(event.start))
    return event if known else None


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
    """The models of a registry, by name; none if there is no such folder. Raises RunError if it is something else."""
    if os.path.lexists(registry) and not registry.is_dir():
        raise RunError(f"{registry}: is no folder, so no registry; give another --registry")
    return sorted(path.name for path in registry.glob("*") if NAME.fullmatch(path.name) and _is_shelf(path))


def _is_shelf(folder: Path) -> bool:
    return bool(Shelf(folder).numbers()) or os.path.lexists(folder / HISTORY)
