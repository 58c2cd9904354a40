"""What `qft report --verify --json` prints."""

from typing import Literal

from qft.documents.manifest import Acceptance
from qft.documents.part import Part


class FileVerdict(Part):
    file: str
    """Its path in the run's folder; in full of a base that lies elsewhere."""
    verdict: Literal["whole", "changed", "missing", "unreadable", "extra"]
    """extra: it has no hash, and lies where a loader could take it for part of the adapter or the model."""


class RunVerification(Part):
    run: str
    recorded: bool
    """Whether the run has hashes of what it wrote."""
    whole: bool | None
    """Whether every file is as it was written; None: that cannot be known."""
    base: str | None
    """Folder of the base of its adapter, of which the files are verified too; None: it is not on this machine, or there
    is no adapter."""
    files: list[FileVerdict]
    """Those of its exports too, which have hashes of their own."""
    accepted: list[Acceptance]
    problems: list[str]
    """Sentences with the ways out; none if it is whole."""
