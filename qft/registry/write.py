"""The three steps that change a registry: add, promote, rollback. A kill at any moment leaves it valid.

A version is filled under a name that nobody reads and becomes vN by one rename. A promote or rollback is written into
the history first and then done by one rename of `current`; whoever writes next finishes what was cut off between.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from qft.disk import nearest_folder, require_free_space
from qft.documents.recorded import SIDE
from qft.documents.registry import Event, Finding, Verdict, VersionManifest
from qft.errors import GateError, MissingError, NonFiniteError, QftError, RecipeError, RunError
from qft.files import files_of, now, sha256, write_json
from qft.registry.base import base_entry, record_base
from qft.registry.shelf import (
    ADD_LOCK,
    ARTIFACT,
    HISTORY,
    LOCK,
    MANIFEST,
    ORIGINAL,
    Action,
    History,
    Shelf,
    find_shelf,
    flush,
)
from qft.registry.verify import Which, inspect_entry, pending

FACTS = ("target", "base", "data", "recipe", "scores", "gate", "run")
"""What a manifest says beside bytes and hashes, None where nobody said it; see facts_of."""


def add(registry: Path, name: str, artifact: Path, facts: VersionManifest, *, reason: str = "") -> int:
    """Copy a finished artifact's folder in as the next version, and return its number. It does not become current.

    It is copied, not moved: what is cut off then costs nothing but the copy. `facts` has fields of FACTS, and may have
    `sha256`, by file, which the copy must hash to. Raises RecipeError for a bad name or an unknown fact, MissingError
    if there is no artifact, RunError if it cannot be copied, GateError if it is not what `sha256` says."""
    shelf = find_shelf(registry, name, new=True)
    with _changing(shelf):
        _require_addable(registry, artifact, facts)
        shelf.folder.mkdir(parents=True, exist_ok=True)
        with shelf.locked(ADD_LOCK):
            _remove_leftovers(shelf)
            return _add(shelf, artifact, facts, reason)


def _add(shelf: Shelf, artifact: Path, facts: VersionManifest, reason: str) -> int:
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


@contextmanager
def _changing(shelf: Shelf) -> Iterator[None]:
    """Around a change: what the file system refuses is a RunError."""
    try:
        yield
    except OSError as error:
        place = error.filename or shelf.folder
        text = f"{place}: {error.strerror or error}; see that {shelf.folder} can be written, or give another --registry"
        raise RunError(text) from error


def require_usable(registry: Path, name: str) -> None:
    """Raise what `add` would raise of its registry, while there is no artifact yet: RecipeError for a bad name,
    RunError for a folder that cannot be written, or another add that is under way. And RunError for a damaged history,
    although `add` takes it: better mended before an export than remembered after it."""
    shelf = find_shelf(registry, name, new=True)
    folder = nearest_folder(shelf.folder)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise RunError(f"{folder}: a registry cannot be written there; name another folder with --registry")
    if shelf.busy():
        raise RunError(f"{shelf.folder}: another command is adding a version; try again once it is done")
    shelf.history()


def promote(registry: Path, name: str, version: int, *, reason: str = "", force: bool = False) -> None:
    """Make a version current. Raises GateError if its files are not what was added, or if its gate did not pass: unless
    `force`, which the history then says. Raises RunError if it is current, MissingError if it is not there."""
    shelf = find_shelf(registry, name)
    entry = f"v{version}"
    _require_whole(shelf, inspect_entry(shelf, entry))
    forced = _require_gate(shelf, entry, force)
    with _changing(shelf), shelf.locked(LOCK):
        if _recover(shelf) != ("promote", entry):  # a retry of what was cut off is done by that
            _move(shelf, "promote", entry, reason, forced)


def rollback(registry: Path, name: str, to: Which = None, *, reason: str = "", force: bool = False) -> str:
    """Make an earlier version current: the one before (None), a numbered one, or the base that the current one was made
    from ("original"), of which only a record is kept. Returns vN or original-HASH.

    Raises RunError if there is nothing to go back to, MissingError if it is not there, GateError if its files have
    changed, or if it was never current and its gate did not pass. `force` overrides the gate, and for the original that
    its files must be on this machine; the history then says so."""
    shelf = find_shelf(registry, name)
    with _changing(shelf), shelf.locked(LOCK):
        recovered = _recover(shelf)
        if recovered and recovered[0] == "rollback" and to in (None, _plain(recovered[1])):
            return recovered[1]  # a retry of what was cut off, which must not go one further
        # Where `current` is damaged, what it was by the history is gone back from.
        history = shelf.read_history()
        current = shelf.leads_to() or history.recorded
        lost = history.damaged or os.path.lexists(shelf.folder / "current")
        if current is None and not (lost and isinstance(to, int)):
            raise RunError(f"{name}: nothing is current, so there is nothing to go back from; promote a version")
        entry = f"v{to}" if isinstance(to, int) else _rollback_entry(shelf, history, str(current), to)
        _move(shelf, "rollback", entry, reason, _require_acceptable(shelf, entry, force))
    return entry


def _require_acceptable(shelf: Shelf, entry: str, force: bool) -> bool:
    """Whether going back to it takes force. Raises GateError if it does and there is none, or force cannot help."""
    finding = inspect_entry(shelf, entry)
    if entry.startswith(ORIGINAL):
        if not finding.whole and not force:
            raise GateError("\n".join([*finding.sentences(), "--force goes back to it all the same"]))
        return not finding.whole
    _require_whole(shelf, finding)
    was_current = entry in [event.to for event in shelf.read_history().moves]
    return False if was_current else _require_gate(shelf, entry, force)


def _rollback_entry(shelf: Shelf, history: History, current: str, to: Which) -> str:
    if to is None:
        trail = _trail(history.moves)
        before = trail[:-1] if current in trail[-1:] else trail  # else it was led there by hand
        if not before:
            raise RunError(f"{shelf.folder.name}: nothing was current before {current}{_others(shelf, current)}")
        return before[-1]
    if current.startswith(ORIGINAL):
        return current
    try:
        base = shelf.manifest(current).base
    except QftError as error:
        raise RunError(f"{error}; so its base is not known{_others(shelf, current)}") from None
    entry = base_entry(base, current)
    assert base is not None
    record_base(shelf, entry, base)
    return entry


def _others(shelf: Shelf, current: str) -> str:
    """Where one can go instead, to be said after what cannot be."""
    ways = [f"`{shelf.say('promote', str(number))}`" for number in shelf.numbers() if f"v{number}" != current][-1:]
    with suppress(QftError):
        base_entry(shelf.manifest(current).base, current)
        ways.append(f"`{shelf.say('rollback', '--to', ORIGINAL)}`")
    return f"; go elsewhere by {' or '.join(ways)}" if ways else ""


def _trail(moves: Sequence[Event]) -> list[str]:
    """What was current, oldest first, without what was rolled back: so a second rollback goes one further."""
    trail: list[str] = []
    for event in moves:
        if event.action == "rollback" and event.to in trail[:-1]:
            last = len(trail) - 2 - trail[:-1][::-1].index(event.to)
            trail = trail[: last + 1]
        else:
            trail.append(event.to)
    return trail


def _move(shelf: Shelf, action: Action, entry: str, reason: str, forced: bool) -> None:
    current, recorded = shelf.leads_to(), shelf.read_history().recorded
    if entry == current == recorded:
        raise RunError(f"{shelf.folder.name}: {entry} is current already")
    shelf.append(action, recorded if entry == current else current, entry, reason, forced=forced)
    shelf.point(entry)


def _require_whole(shelf: Shelf, finding: Finding) -> None:
    if not finding.whole:
        text = f"{finding.entry} is not what was added; add it anew, and move {shelf.folder / finding.entry} away"
        raise GateError("\n".join([*finding.sentences(), text]))


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
    except (ValueError, NonFiniteError):
        raise RunError(f"{artifact}: its facts are no JSON: a figure is NaN or infinite, or a text is none") from None
    for path in [*files.values(), folder / MANIFEST]:
        path.chmod(0o444)
        flush(path)


def _open_folders(folder: Path) -> None:
    """Copied from folders that may be read-only, out of which nothing could be deleted."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


def _require_same(artifact: Path, said: dict[str, str], hashes: dict[str, str]) -> None:
    copied = {name: digest for name, digest in hashes.items() if Path(name).name not in SIDE}
    wrong = sorted(name for name in said.keys() | copied.keys() if said.get(name) != copied.get(name))
    if wrong:
        raise GateError(f"{artifact}: is not what was written, by its hashes: {', '.join(wrong[:5])}; export it again")


def _place(shelf: Shelf, temporary: Path) -> int:
    """Give the filled folder the next number: never one that was given, even if that version is gone."""
    history = shelf.read_history()
    given = [int(event.to[1:]) for event in history.events if event.to.startswith("v")]
    number = max([0, *shelf.numbers(), *given, *history.numbers]) + 1
    while True:
        try:
            os.rename(temporary, shelf.folder / f"v{number}")  # refuses to replace a folder that holds anything
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            number += 1
        else:
            flush(shelf.folder)
            return number


def _record_add(shelf: Shelf, number: int, reason: str, **more: bool) -> None:
    digest = sha256(shelf.folder / f"v{number}" / MANIFEST)
    shelf.append("add", None, f"v{number}", reason, manifest_sha256=digest, **more)


def _recover(shelf: Shelf) -> tuple[str, str] | None:
    """Finish what a kill cut off: the record of an add, the step of a promote or rollback; and remove what it left.
    Returns the action and where it led, if it was a step. Call it under the lock."""
    for pattern in (".current.*", f".{HISTORY}.*", f".{ORIGINAL}-*"):
        for path in shelf.folder.glob(pattern):
            _remove(path)
    shelf.clear_history()
    history = shelf.read_history()
    for number in [] if history.damaged else shelf.numbers():  # a damaged line may be the record
        if not history.add_of(f"v{number}") and (shelf.folder / f"v{number}" / MANIFEST).is_file():
            _record_add(shelf, number, "", recovered=True)
    entry = pending(history, shelf.leads_to())
    if entry is None or not (shelf.folder / entry).is_dir():
        return None
    shelf.point(entry)
    return history.moves[-1].action, entry


def _plain(entry: str) -> int | str:
    """vN or original-HASH as `rollback` takes it."""
    return ORIGINAL if entry.startswith(ORIGINAL) else int(entry[1:])


def _remove_leftovers(shelf: Shelf) -> None:
    """Of killed adds. Call it under ADD_LOCK, so that no .add.* belongs to a running one."""
    for path in shelf.folder.glob(".add.*"):
        if path.name != ADD_LOCK:
            _remove(path)


def _remove(path: Path) -> None:
    """Delete it, whatever it is, as far as it lets itself be deleted; what a link leads to is left alone."""
    with suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            _open_folders(path)
            shutil.rmtree(path)
