"""What an export may take the place of: artifacts of its target that qft wrote, and nothing that it reads."""

import os
from collections.abc import Iterable
from pathlib import Path

from qft.documents.export import export_in
from qft.documents.recorded import SIDE
from qft.errors import RunError
from qft.export.job import Job
from qft.export.publish.hub import staging_folder


def require_replaceable(job: Job, targets: Iterable[str], *, overwrite: bool) -> None:
    """Raise RunError for what is in the way in OUT/TARGET and is no artifact of that target, or is there at all without
    `overwrite`; and for what is no leftover of an export in OUT/TARGET.failed and OUT/TARGET.hub, which are replaced
    with no word."""
    inputs = [job.run.folder, job.plan.checkpoint.folder, *filter(None, [job.adapter])]
    for target in targets:
        final = job.out / target
        failed = final.with_name(f"{target}.failed")
        if final.exists() and not overwrite:
            raise RunError(f"{final}: is there already; give --overwrite, or another folder with --out")
        for folder in (final, failed, staging_folder(final)):
            if found := next((path for path in inputs if _is_within(path, folder)), None):
                raise RunError(f"{folder}: would be replaced, and {found} is read for the export; give another --out")
            if os.path.lexists(folder) and (why := _foreign(folder, target)):
                raise RunError(f"{folder}: {why}, so it is not replaced; move it away, or give another --out")


def _is_within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _foreign(folder: Path, target: str) -> str | None:
    """Why it is not what `qft export --to target` wrote; None if it is."""
    mark = export_in(folder)
    if folder.is_symlink() or mark is None or mark.target != target:
        return f"is no {target} that qft exported"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    more = sorted(files - mark.sha256.keys() - {*SIDE})
    return f"holds {more[0]}, which qft did not write" if more else None
