"""Whether a registry holds what it held when its versions were added."""

from pathlib import Path
from typing import Literal

from qft.documents.registry import Event, Finding, VersionManifest
from qft.errors import QftError, RunError
from qft.files import files_of, sha256
from qft.registry.base import base_entry, base_file
from qft.registry.shelf import ARTIFACT, MANIFEST, ORIGINAL, Shelf, find_shelf

Which = int | Literal["original"] | None


def inspect(registry: Path, name: str, version: Which = None) -> list[Finding]:
    """Hash every file of a version; of None: of all versions, and of the base if it is current; of "original": of all
    bases that are recorded. Raises MissingError if there is no such version."""
    shelf = find_shelf(registry, name)
    if isinstance(version, int):
        return [inspect_entry(shelf, f"v{version}")]
    originals = sorted(path.name for path in shelf.folder.glob(f"{ORIGINAL}-*"))
    if version == ORIGINAL:
        return [inspect_entry(shelf, entry) for entry in originals]
    pointer = shelf.folder / "current"
    pointed = pointer.readlink().name if pointer.is_symlink() else None
    entries = [f"v{number}" for number in shelf.numbers()] + [entry for entry in originals if entry == pointed]
    return [inspect_entry(shelf, entry) for entry in entries]


def inspect_entry(shelf: Shelf, entry: str) -> Finding:
    """The same of one entry. Raises MissingError if it is not there."""
    folder = shelf.folder / entry
    if not folder.is_dir():
        shelf.manifest(entry)
    if not (folder / MANIFEST).is_file():
        return Finding.of(entry, missing=[MANIFEST])
    try:
        manifest = shelf.manifest(entry)
    except QftError:
        return Finding.of(entry, changed=[MANIFEST])
    if entry.startswith(ORIGINAL):
        return _inspect_original(entry, manifest)
    return _inspect_version(shelf, entry, manifest)


def _inspect_version(shelf: Shelf, entry: str, manifest: VersionManifest) -> Finding:
    if manifest.sha256 is None:
        return Finding.of(entry, changed=[MANIFEST])
    digests = {f"{ARTIFACT}/{name}": digest for name, digest in manifest.sha256.items()}
    expected = digests | {MANIFEST: _recorded(shelf, entry)}
    there = files_of(shelf.folder / entry)
    changed = [name for name, digest in expected.items() if name in there and digest and _differs(there[name], digest)]
    missing, extra = sorted(expected.keys() - there.keys()), sorted(there.keys() - expected.keys())
    return Finding.of(entry, missing=missing, changed=changed, extra=extra)


def _recorded(shelf: Shelf, entry: str) -> str | None:
    """What the manifest hashed to when the version was added; None if a kill came before the record."""
    try:
        adds = [event for event in shelf.history() if (event.action, event.to) == ("add", entry)]
    except QftError:  # problems() tells of it
        return None
    return adds[0].manifest_sha256 if adds else None


def _inspect_original(entry: str, manifest: VersionManifest) -> Finding:
    base = manifest.base
    if base is None or not base.sha256 or base_entry(base, entry) != entry:
        return Finding.of(entry, changed=[MANIFEST])
    files = {name: base_file(base, name) for name in base.sha256}
    missing = [f"{base.path}: {name}" for name, path in files.items() if path is None]
    changed = [str(path) for name, path in files.items() if path and _differs(path, base.sha256[name])]
    return Finding.of(entry, missing=missing, changed=changed)


def _differs(path: Path, digest: str) -> bool:
    return not path.is_file() or sha256(path) != digest


def problems(registry: Path, name: str, findings: list[Finding] | None = None) -> list[str]:
    """All that is wrong with a model's folder, in sentences; none if it is valid, which is when

    - every version is whole and hashes to what its manifest and the record of its add say, the base too if current,
    - `current` is absent or leads to a version, or to the record of a base,
    - every line of the history parses, and its last promote or rollback leads to where `current` does; or is one step
      ahead of it, as a kill between the two leaves it: the next add, promote or rollback then takes that step,
    - every version has the record of its add; a kill may have left the newest without, and the next command adds it.

    What begins with a dot is not looked at. `findings` are those of `inspect`, if it was asked before. Raises
    MissingError if there is no such model."""
    shelf = find_shelf(registry, name)
    findings = inspect(registry, name) if findings is None else findings
    sentences = [text for finding in findings for text in finding.sentences()]
    try:
        history, current = shelf.history(), shelf.current()
    except QftError as error:
        return [*sentences, str(error)]
    if current and not (shelf.folder / current).is_dir():
        sentences.append(f"current: leads to {current}, which is not there")
    try:
        pending(history, current)
    except QftError as error:
        sentences.append(str(error))
    added = {event.to for event in history if event.action == "add"}
    unrecorded = [number for number in shelf.numbers() if f"v{number}" not in added]
    return sentences + [f"v{number}: no record of its add" for number in unrecorded if number != max(shelf.numbers())]


def pending(history: list[Event], current: str | None) -> str | None:
    """Where `current` should lead, if the last promote or rollback was cut off before it got there; else None.

    Raises RunError if `current` leads neither where it did before nor after."""
    moves = [event for event in history if event.action != "add"]
    start, end = (moves[-1].start, moves[-1].to) if moves else (None, None)
    if end == current:
        return None
    if start != current:
        raise RunError(
            f"current: leads to {current}, and by the history it should lead to {end}; "
            "set it right by hand (ln -sfn) before anything else"
        )
    return end
