"""`qft report --verify`: every file of a run, and of its exports, beside the hash of when it was written."""

from pathlib import Path

from qft.documents.manifest import Acceptance, Manifest
from qft.documents.recorded import EXPORT, Record, record_of, record_of_run
from qft.documents.verification import FileVerdict, RunVerification
from qft.errors import MissingError, RunError
from qft.files import now
from qft.run.folder import Run


def verify(folder: Path) -> RunVerification:
    """Hash all that has a hash. Raises MissingError if the folder is no run."""
    manifest = _manifest(folder)
    run = record_of_run(folder)
    exports = [record for path in sorted(folder.glob(f"export/*/{EXPORT}")) if (record := record_of(path.parent))]
    files, problems = [], [] if run else [_unrecorded(folder, manifest)]
    for record in [run, *exports] if run else exports:
        verdicts = record.verdicts()
        files += [FileVerdict(file=_name(folder, record, name), verdict=kind) for name, kind in verdicts.items()]
        if wrong := {name: kind for name, kind in verdicts.items() if kind != "whole"}:
            problems.append(record.complaint(wrong))
    whole = all(file.verdict == "whole" for file in files)
    return RunVerification(
        run=str(folder),
        recorded=run is not None,
        whole=whole if run or not whole else None,
        files=files,
        accepted=manifest.accepted,
        problems=problems,
    )


def accept(folder: Path) -> RunVerification:
    """Record a run's files as they are now, and which of them are not as they were recorded, and verify it.

    Raises MissingError if the folder is no run, RunError if the run is still to write them."""
    manifest, record = _manifest(folder), record_of_run(folder)
    if manifest.status not in ("complete", "refused"):
        raise RunError(f"{folder}: the run is {manifest.status}, so its files are not yet what they will be")
    run = Run(folder)
    files = run.hashes()
    before = record.digests if record else {}
    if changed := sorted(name for name in files.keys() | before.keys() if files.get(name) != before.get(name)):
        accepted = [*manifest.accepted, Acceptance(time=now(), files=changed)]
        run.note(manifest.model_copy(update={"files": files, "accepted": accepted}))
    return verify(folder)


def _manifest(folder: Path) -> Manifest:
    manifest = Run(folder).manifest()
    if manifest is None:
        raise MissingError(f"{folder}: is no run of qft")
    return manifest


def _name(folder: Path, record: Record, name: str) -> str:
    return (record.folder / name).relative_to(folder).as_posix()


def _unrecorded(folder: Path, manifest: Manifest) -> str:
    if manifest.status in ("complete", "refused"):
        return (
            f"{folder}: its manifest has no hashes, as an older qft wrote it, so it cannot be verified; if its files "
            "are what they should be, --accept records them from now on"
        )
    return f"{folder}: the run is {manifest.status}; hashes are recorded once it is complete"
