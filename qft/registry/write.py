"""The three steps that change a registry: add, promote, rollback. A kill at any moment leaves it valid.

A version is filled under a name that nobody reads and becomes vN by one rename. A promote or rollback is written into
the history first and then done by one rename of `current`; whoever writes next finishes what was cut off between.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qft.documents.recorded import SIDE
from qft.documents.registry import Event, Finding, Verdict, VersionManifest
from qft.errors import GateError, MissingError, RecipeError, RunError
from qft.files import files_of, nearest_folder, now, require_free_space, sha256, write_json
from qft.registry.base import base_entry, record_base
from qft.registry.shelf import ADD_LOCK, ARTIFACT, LOCK, MANIFEST, ORIGINAL, Action, Shelf, find_shelf, flush
from qft.registry.verify import Which, inspect_entry, pending

FACTS = ("target", "base", "data", "recipe", "scores", "gate", "run")
"""What a manifest says beside bytes and hashes, None where nobody said it; see facts_of."""


def add(registry: Path, name: str, artifact: Path, facts: VersionManifest, *, reason: str = "") -> int:
    """Copy a finished artifact's folder in as the next version, and return its number. It does not become current.

    It is copied, not moved: what is cut off then costs nothing but the copy. `facts` has fields of FACTS, and may have
    `sha256`, by file, which the copy must hash to. Raises RecipeError for a bad name or an unknown fact, MissingError
    if there is no artifact, RunError if it cannot be copied, GateError if it is not what `sha256` says."""
    shelf = find_shelf(registry, name, new=True)
    _require_addable(registry, artifact, facts)
    shelf.folder.mkdir(parents=True, exist_ok=True)
    with shelf.locked(ADD_LOCK):
        _remove_leftovers(shelf)
        temporary = Path(tempfile.mkdtemp(dir=shelf.folder, prefix=".add."))
        try:
            _fill(temporary, artifact, facts)
            with shelf.locked(LOCK):
                _recover(shelf)
                number = _place(shelf, temporary)
                _record_add(shelf, number, reason)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return number


def require_usable(registry: Path, name: str) -> None:
    """Raise what `add` would raise of its registry, while there is no artifact yet: RecipeError for a bad name,
    RunError for a folder that cannot be written, a broken history, or another add that is under way."""
    shelf = find_shelf(registry, name, new=True)
    folder = nearest_folder(shelf.folder)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise RunError(f"{folder}: a registry cannot be written there; name another folder with --registry")
    if shelf.busy():
        raise RunError(f"{shelf.folder}: another command is adding a version; try again once it is done")
    pending(shelf.history(), shelf.current())


def promote(registry: Path, name: str, version: int, *, reason: str = "", force: bool = False) -> None:
    """Make a version current. Raises GateError if its files are not what was added, or if its gate did not pass: unless
    `force`, which the history then says. Raises RunError if it is current, MissingError if it is not there."""
    shelf = find_shelf(registry, name)
    entry = f"v{version}"
    _require_whole(inspect_entry(shelf, entry))
    forced = _require_gate(shelf, entry, force)
    with shelf.locked(LOCK):
        if _recover(shelf) != ("promote", entry):  # a retry of what was cut off is done by that
            _move(shelf, "promote", entry, reason, forced)


def rollback(registry: Path, name: str, to: Which = None, *, reason: str = "", force: bool = False) -> str:
    """Make an earlier version current: the one before (None), a numbered one, or the base that the current one was made
    from ("original"), of which only a record is kept. Returns vN or original-HASH.

    Raises RunError if there is nothing to go back to, MissingError if it is not there, GateError if its files have
    changed, or if it was never current and its gate did not pass. `force` overrides the gate, and for the original that
    its files must be on this machine; the history then says so."""
    shelf = find_shelf(registry, name)
    with shelf.locked(LOCK):
        recovered = _recover(shelf)
        current = shelf.current()
        if recovered and recovered[0] == "rollback" and to in (None, _plain(recovered[1])):
            return recovered[1]  # a retry of what was cut off, which must not go one further
        if current is None:
            raise RunError(f"{name}: nothing is current, so there is nothing to go back from; promote a version")
        entry = _rollback_entry(shelf, current, to)
        _move(shelf, "rollback", entry, reason, _require_acceptable(shelf, entry, force))
    return entry


def _require_acceptable(shelf: Shelf, entry: str, force: bool) -> bool:
    """Whether going back to it takes force. Raises GateError if it does and there is none, or force cannot help."""
    finding = inspect_entry(shelf, entry)
    if entry.startswith(ORIGINAL):
        if not finding.whole and not force:
            raise GateError("\n".join([*finding.sentences(), "--force goes back to it all the same"]))
        return not finding.whole
    _require_whole(finding)
    was_current = entry in [event.to for event in shelf.history() if event.action != "add"]
    return False if was_current else _require_gate(shelf, entry, force)


def _rollback_entry(shelf: Shelf, current: str, to: Which) -> str:
    if isinstance(to, int):
        return f"v{to}"
    if to is None:
        before = _trail(shelf.history())[:-1]
        if not before:
            raise RunError(f"{shelf.folder.name}: nothing was current before {current}; its base is --to original")
        return before[-1]
    if current.startswith(ORIGINAL):
        raise RunError(f"{shelf.folder.name}: {current} is current already")
    base = shelf.manifest(current).base
    entry = base_entry(base, current)
    assert base is not None
    record_base(shelf, entry, base)
    return entry


def _trail(history: Sequence[Event]) -> list[str]:
    """What was current, oldest first, without what was rolled back: so a second rollback goes one further."""
    trail: list[str] = []
    for event in history:
        if event.action == "rollback" and event.to in trail[:-1]:
            last = len(trail) - 2 - trail[:-1][::-1].index(event.to)
            trail = trail[: last + 1]
        elif event.action != "add":
            trail.append(event.to)
    return trail


def _move(shelf: Shelf, action: Action, entry: str, reason: str, forced: bool) -> None:
    current = shelf.current()
    if entry == current:
        raise RunError(f"{shelf.folder.name}: {entry} is current already")
    shelf.append(action, current, entry, reason, forced=forced)
    shelf.point(entry)


def _require_whole(finding: Finding) -> None:
    if not finding.whole:
        raise GateError("\n".join(finding.sentences()))


def _require_gate(shelf: Shelf, entry: str, force: bool) -> bool:
    """Whether it takes force. Raises GateError if it does and there is none."""
    gate = shelf.manifest(entry).gate or Verdict()
    if not gate.passed and not force:
        failed = ", ".join(check.name for check in gate.checks if not check.passed)
        why = "was not run" if gate.passed is None else "did not pass"
        text = f"{shelf.folder.name} {entry}: its gate {why}{f' ({failed})' if failed else ''}"
        raise GateError(f"{text}; --force makes it current all the same, and the history says so")
    return not gate.passed


def _require_addable(registry: Path, artifact: Path, facts: VersionManifest) -> None:
    unknown = sorted(facts.model_fields_set - {*FACTS, "sha256"})
    if unknown:
        raise RecipeError(f"{', '.join(unknown)}: is no fact of a version; known: {', '.join(FACTS)}, sha256")
    if not artifact.is_dir():
        raise MissingError(f"{artifact}: is no folder; give the folder of an exported model")
    if registry.resolve().is_relative_to(artifact.resolve()):
        raise RunError(f"{artifact}: holds the registry {registry}; give the artifact's own folder")
    files = files_of(artifact)
    if not files:
        raise MissingError(f"{artifact}: holds no files")
    needed = sum(path.stat().st_size for path in files.values() if path.is_file())
    require_free_space(registry, needed, "a version's copy")


def _fill(folder: Path, artifact: Path, facts: VersionManifest) -> None:
    """Copy, hash, compare, describe, make read-only."""
    try:
        shutil.copytree(artifact, folder / ARTIFACT)
    except (shutil.Error, OSError) as error:
        raise RunError(f"{artifact}: cannot be copied: {str(error)[:300]}") from None
    _open_folders(folder)
    files = files_of(folder / ARTIFACT)
    hashes = {name: sha256(path) for name, path in files.items()}
    if facts.sha256 is not None:
        _require_same(artifact, facts.sha256, hashes)
    size = sum(path.stat().st_size for path in files.values())
    manifest = facts.model_copy(update={"created": now(), "bytes": size, "sha256": hashes})
    try:
        write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    except ValueError as error:
        raise RunError(f"{artifact}: its facts are no JSON: {error}") from None
    for path in [*files.values(), folder / MANIFEST]:
        path.chmod(0o444)
        flush(path)


def _open_folders(folder: Path) -> None:
    """Copied from folders that may be read-only, out of which nothing could be deleted."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)


def _require_same(artifact: Path, said: dict[str, str], hashes: dict[str, str]) -> None:
    copied = {name: digest for name, digest in hashes.items() if Path(name).name not in SIDE}
    wrong = sorted(name for name in said.keys() | copied.keys() if said.get(name) != copied.get(name))
    if wrong:
        raise GateError(f"{artifact}: is not what was written, by its hashes: {', '.join(wrong[:5])}; export it again")


def _place(shelf: Shelf, temporary: Path) -> int:
    """Give the filled folder the next number: never one that was given, even if that version is gone."""
    added = [int(event.to[1:]) for event in shelf.history() if event.action == "add"]
    number = max([0, *shelf.numbers(), *added]) + 1
    while True:
        try:
            os.rename(temporary, shelf.folder / f"v{number}")  # refuses to replace a folder that holds anything
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            number += 1
        else:
            flush(shelf.folder)
            return number


def _record_add(shelf: Shelf, number: int, reason: str, **more: bool) -> None:
    digest = sha256(shelf.folder / f"v{number}" / MANIFEST)
    shelf.append("add", None, f"v{number}", reason, manifest_sha256=digest, **more)


def _recover(shelf: Shelf) -> tuple[str, str] | None:
    """Finish what a kill cut off: the record of an add, the step of a promote or rollback. Returns the action and where
    it led, if it was a step. Call it under the lock."""
    added = {event.to for event in shelf.history() if event.action == "add"}
    for number in shelf.numbers():
        if f"v{number}" not in added and (shelf.folder / f"v{number}" / MANIFEST).is_file():
            _record_add(shelf, number, "", recovered=True)
    history = shelf.history()
    entry = pending(history, shelf.current())
    if entry is None or not (shelf.folder / entry).is_dir():
        return None
    shelf.point(entry)
    return next(event.action for event in reversed(history) if event.action != "add"), entry


def _plain(entry: str) -> int | str:
    """vN or original-HASH as `rollback` takes it."""
    return ORIGINAL if entry.startswith(ORIGINAL) else int(entry[1:])


def _remove_leftovers(shelf: Shelf) -> None:
    """Of killed commands. Call it under ADD_LOCK, so that no .add.* belongs to a running add."""
    for path in shelf.folder.glob(".add.*"):
        if path.name != ADD_LOCK:
            _open_folders(path)
            shutil.rmtree(path)
    with shelf.locked(LOCK):
        for path in [*shelf.folder.glob(".current.*"), *shelf.folder.glob(".history.jsonl.*")]:
            path.unlink()
        for path in shelf.folder.glob(f".{ORIGINAL}-*"):
            shutil.rmtree(path)
