"""`qft report --verify`: every file of a run, of its exports and of its adapter's base, beside the hash of when it was
written or read."""

from pathlib import Path

from qft.checkpoint.digest import described
from qft.documents.manifest import Acceptance, Base, Manifest
from qft.documents.recorded import EXPORT, Record, record_of, record_of_run
from qft.documents.verification import FileVerdict, RunVerification
from qft.errors import RunError
from qft.files import now, sha256
from qft.registry.base import base_file
from qft.run.folder import Run


def verify(folder: Path) -> RunVerification:
    """Hash all that has a hash. Raises MissingError if the folder is no run."""
    manifest = _manifest(folder)
    run, base = record_of_run(folder), _base(folder, manifest)
    exports = [record for path in sorted(folder.glob(f"export/*/{EXPORT}")) if (record := record_of(path.parent))]
    files, problems = [], [] if run else [_unrecorded(folder, manifest)]
    for record in filter(None, [run, *exports, base if run else None]):
        verdicts = record.verdicts() | (dict.fromkeys(_added(record, manifest), "extra") if record is base else {})
        files += [FileVerdict(file=_name(folder, record, name), verdict=kind) for name, kind in verdicts.items()]
        if wrong := {name: kind for name, kind in verdicts.items() if kind != "whole"}:
            problems.append(record.complaint(wrong))
    whole = all(file.verdict == "whole" for file in files)
    return RunVerification(
        run=str(folder),
        recorded=run is not None,
        whole=whole if run or not whole else None,
        base=str(base.folder) if base else None,
        files=files,
        accepted=manifest.accepted,
        problems=problems,
    )


def accept(folder: Path) -> RunVerification:
    """Record a run's files and its base as they are now, and which of them are not as they were recorded, and verify
    it.

    Raises MissingError if the folder is no run, RunError if the run is still to write them."""
    manifest, record = _manifest(folder), record_of_run(folder)
    if manifest.status not in ("complete", "refused"):
        raise RunError(f"{folder}: the run is {manifest.status}, so its files are not yet what they will be")
    run = Run(folder)
    files = run.hashes()
    before = record.digests if record else {}
    changed = sorted(name for name in files.keys() | before.keys() if files.get(name) != before.get(name))
    base = manifest.base
    if base and (found := _base(folder, manifest)):
        names = [*base.sha256, *_added(found, manifest)]
        digests = {name: sha256(found.folder / name) for name in names if (found.folder / name).is_file()}
        changed += [str(found.folder / name) for name in base.changed(digests)]
        base = base.model_copy(update={"sha256": digests})
    if changed:
        accepted = [*manifest.accepted, Acceptance(time=now(), files=changed)]
        run.note(manifest.model_copy(update={"files": files, "base": base, "accepted": accepted}))
    return verify(folder)


def _manifest(folder: Path) -> Manifest:
    run = Run(folder)
    manifest = run.manifest()
    if manifest is None:
        raise run.no_run()
    return manifest


def _base(folder: Path, manifest: Manifest) -> Record | None:
    """What the run's adapter was trained on; None if it has none, or the base is not on this machine."""
    base, run = manifest.base or Base(path=""), record_of_run(folder)
    places = ((name, base_file(base, name)) for name in base.sha256) if Run(folder).adapter.is_dir() else ()
    found = next(((name, path) for name, path in places if path), None)
    if found is None:
        return None
    root = found[1].parents[len(Path(found[0]).parts) - 1]
    meant = run.meant if run else ""
    return Record(root, base.sha256, str(folder / "manifest.json"), meant, folders=())


def _added(base: Record, manifest: Manifest) -> list[str]:
    """Names of files that are read of a base, and were not there when it was trained on."""
    gguf = next((name for name in base.digests if name.endswith(".gguf")), "")
    there = {path.relative_to(base.folder).as_posix(): "" for path in described(base.folder / gguf)}
    return [name for name in manifest.base.changed(there) if name not in base.digests] if manifest.base else []


def _name(folder: Path, record: Record, name: str) -> str:
    path = record.folder / name
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _unrecorded(folder: Path, manifest: Manifest) -> str:
    if manifest.status in ("complete", "refused"):
        return (
            f"{folder}: its manifest has no hashes, as an older qft wrote it, so it cannot be verified; if its files "
            "are what they should be, --accept records them from now on"
        )
    return f"{folder}: the run is {manifest.status}; hashes are recorded once it is complete"
