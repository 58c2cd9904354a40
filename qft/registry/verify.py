"""Whether a registry holds what it held when its versions were added."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from qft.documents.registry import Finding, VersionManifest
from qft.errors import MissingError, QftError
from qft.files import files_of, verdict
from qft.registry.base import base_entry, base_file
from qft.registry.shelf import ADD_LOCK, ARTIFACT, ENTRY, LOCK, MANIFEST, ORIGINAL, History, Shelf, find_shelf

KINDS = ("missing", "changed", "unreadable")

Which = int | Literal["original"] | None


def inspect(registry: Path, name: str, version: Which = None) -> list[Finding]:
    """Hash every file of a version; of None: of all versions, and of the base if it is current; of "original": of all
    bases that are recorded. Raises MissingError if there is no such version."""
    shelf = find_shelf(registry, name)
    if isinstance(version, int):
        return [inspect_entry(shelf, f"v{version}")]
    originals = sorted(path.name for path in shelf.folder.glob(f"{ORIGINAL}-*") if ENTRY.fullmatch(path.name))
    if version == ORIGINAL:
        return [inspect_entry(shelf, entry) for entry in originals]
    current = shelf.leads_to()
    entries = [f"v{number}" for number in shelf.numbers()] + [entry for entry in originals if entry == current]
    return [inspect_entry(shelf, entry) for entry in entries]


def inspect_entry(shelf: Shelf, entry: str) -> Finding:
    """The same of one entry. Raises MissingError if it is not there."""
    try:
        manifest = shelf.manifest(entry)
    except MissingError:
        raise
    except QftError:
        there = os.path.lexists(shelf.folder / entry / MANIFEST)
        return Finding.of(entry, **{"changed" if there else "missing": [MANIFEST]})
    if entry.startswith(ORIGINAL):
        return _inspect_original(entry, manifest)
    return _inspect_version(shelf, entry, manifest)


def _inspect_version(shelf: Shelf, entry: str, manifest: VersionManifest) -> Finding:
    if manifest.sha256 is None:
        return Finding.of(entry, changed=[MANIFEST])
    expected = {f"{ARTIFACT}/{name}": digest for name, digest in manifest.sha256.items()}
    if digest := _recorded(shelf, entry):
        expected[MANIFEST] = digest
    found = {name: verdict(shelf.folder / entry / name, digest) for name, digest in sorted(expected.items())}
    by_kind = {kind: [name for name, each in found.items() if each == kind] for kind in KINDS}
    extra = sorted(files_of(shelf.folder / entry).keys() - expected.keys() - {MANIFEST})
    return Finding.of(entry, **by_kind, extra=extra)


def _recorded(shelf: Shelf, entry: str) -> str | None:
    """What the manifest hashed to when the version was added; None if there is no record of that."""
    event = shelf.read_history().add_of(entry)
    return event.manifest_sha256 if event else None


def _inspect_original(entry: str, manifest: VersionManifest) -> Finding:
    base = manifest.base
    if base is None or not base.sha256 or base_entry(base, entry) != entry:
        return Finding.of(entry, changed=[MANIFEST])
    files = {name: base_file(base, name) for name in base.sha256}
    missing = [f"{base.path}: {name}" for name, path in files.items() if path is None]
    found = {str(path): verdict(path, base.sha256[name]) for name, path in files.items() if path}
    by_kind = {kind: [name for name, each in found.items() if each == kind] for kind in KINDS}
    return Finding.of(entry, **by_kind | {"missing": missing + by_kind["missing"]})


def problems(registry: Path, name: str, findings: list[Finding] | None = None) -> list[str]:
    """All that is wrong with a model's folder, in sentences; none if it is valid, which is when

    - every version is whole and hashes to what its manifest and the record of its add say, the base too if current,
    - `current` is absent or leads to a version, or to the record of a base,
    - every line of the history parses, and its last promote or rollback leads to where `current` does; or is one step
      ahead of it, as a kill between the two leaves it: the next add, promote or rollback then takes that step,
    - every version has the record of its add; a kill may have left the newest without, and the next command adds it.

    What begins with a dot is not looked at, but for locks. `findings` are those of `inspect`, if it was asked before.
    Raises MissingError if there is no such model."""
    shelf = find_shelf(registry, name)
    findings = inspect(registry, name) if findings is None else findings
    sentences = [text for finding in findings for text in finding.sentences()]
    history, numbers = shelf.read_history(), shelf.numbers()
    unrecorded = [number for number in numbers[:-1] if not history.add_of(f"v{number}")]
    how = "restore its line in the history" if history.damaged else "the next change records it as it is"
    sentences += [f"v{number}: no record of its add; {how}" for number in unrecorded]
    seen = {finding.entry for finding in findings}
    return [*sentences, *_damages(shelf), *(text for entry, text in _unreadable(shelf) if entry not in seen)]


def damages(shelf: Shelf) -> list[str]:
    """What of a model's folder can be seen to be damaged without hashing anything, in sentences with a way out."""
    return [*_damages(shelf), *(text for _, text in _unreadable(shelf))]


def _damages(shelf: Shelf) -> Iterator[str]:
    history = shelf.read_history()
    yield from history.damaged
    for name in (LOCK, ADD_LOCK):
        if os.path.lexists(path := shelf.folder / name) and not path.is_file():
            yield f"{path}: is no file, so folders are locked in its place; remove it while no command runs"
    try:
        current = shelf.current()
    except QftError as error:
        yield str(error)
        return
    if current and not (shelf.folder / current).is_dir():
        yield f"current: leads to {current}, which is not there{_ways(shelf.say_back())}"
    elif not history.cut and pending(history, current) is None and history.recorded != current:
        stay = current and shelf.say("rollback", "--to", current if current.startswith("v") else ORIGINAL)
        ways = _ways(history.recorded and shelf.say_back(), stay)
        yield f"current: leads to {current or 'nothing'}, and by the history to {history.recorded or 'nothing'}{ways}"


def _ways(*commands: str | None) -> str:
    """How to mend it, to be said after what is wrong."""
    told = " or ".join(f"`{command}`" for command in commands if command)
    return f"; settle it by {told}" if told else ""


def _unreadable(shelf: Shelf) -> Iterator[tuple[str, str]]:
    """Entries, and what is wrong with each."""
    originals = sorted(path.name for path in shelf.folder.glob(f"{ORIGINAL}-*") if ENTRY.fullmatch(path.name))
    for entry in [*(f"v{number}" for number in shelf.numbers()), *originals]:
        if not (shelf.folder / entry).is_dir():
            yield entry, f"{shelf.folder / entry}: is no folder of a version; move it away"
            continue
        try:
            shelf.manifest(entry)
        except QftError as error:
            yield entry, str(error)


def pending(history: History, current: str | None) -> str | None:
    """Where `current` should lead, if the last promote or rollback was cut off before it got there; else None: also
    where it was led elsewhere by hand, or a damaged line may say more."""
    if history.cut or not history.moves:
        return None
    last = history.moves[-1]
    return last.to if last.to != current and last.start == current else None
