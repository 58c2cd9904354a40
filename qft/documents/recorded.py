"""What files hashed to when qft wrote them, by the document that lies with them, and whether they still do."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from shlex import quote
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from qft.documents.manifest import Manifest
from qft.documents.registry import VersionManifest
from qft.errors import DamagedError
from qft.files import files_of, read_file, sha256, verdict

MANIFEST, EXPORT = "manifest.json", "export.json"
SIDE = (EXPORT, "README.md")
"""Files that tell of an export and are not part of what was hashed."""
RESULTS = ("adapter", "model")
"""Folders of a run that hold what came of it."""
EVALUATION = ("eval.json", "report.html", "answers")
"""Files of an evaluation, and the folder of its answers."""
WORK = (
    "block-[0-9]*.json", "block-[0-9]*.safetensors", "done-[0-9]*.json", "errors-[0-9]*.json", "experts-[0-9]*.json",
    "streams-[0-9]*.safetensors", "engine/*", "quantized/*", "unquantized/*",
)  # fmt: skip
"""What a calibration keeps in its run's work/ until it is complete, by paths below that."""
LOADED = (".bin", ".gguf", ".jinja", ".json", ".model", ".py", ".safetensors", ".tiktoken", ".txt")
"""Endings of what a loader could take for part of a model."""

Document = TypeVar("Document", bound=BaseModel)
Read = Callable[[Path], str]


def lies_beside(name: str) -> bool:
    """Whether no loader could take a file of a result for part of it, nor qft wrote it: somebody's notes, say."""
    return not name.endswith((*LOADED, *SIDE))


def lies_beside_work(name: str) -> bool:
    """Whether a file in a run's work/, by its path below that, is no calibration's."""
    return not any(fnmatch(name, made) for made in WORK)


class _Exported(BaseModel):
    sha256: dict[str, str]


@dataclass(frozen=True)
class Record:
    """SHA-256 of files, by their paths below `folder`."""

    folder: Path
    digests: Mapping[str, str]
    document: str
    """That says so; its path below the folder."""
    meant: str
    """How to say that a change is meant."""
    folders: tuple[str, ...] = ("",)
    """Those of which every file was recorded; empty: all."""

    def part(self, name: str) -> "Record":
        """That of one file or folder in it."""
        within = {file: digest for file, digest in self.digests.items() if Path(file).is_relative_to(name)}
        return replace(self, digests=within, folders=tuple(folder for folder in self.folders if folder == name))

    def below(self, folder: Path) -> dict[str, str]:
        """Its digests by the files' paths within one of its folders, but for those of SIDE."""
        paths = ((self.folder / name, digest) for name, digest in self.digests.items())
        return {os.path.relpath(path, folder): digest for path, digest in paths if path.name not in SIDE}

    def verdicts(self, read: Read = sha256) -> dict[str, str]:
        """whole, changed, missing or unreadable of each file; extra of what a loader could take for one of them."""
        found = ((name, verdict(self.folder / name, digest, read)) for name, digest in self.digests.items())
        return dict[str, str](found) | dict.fromkeys(self._extra(), "extra")

    def require_whole(self, read: Read = sha256, *, absent: tuple[str, ...] = ()) -> None:
        """Raise DamagedError unless all is as it was written; files that `absent` names may be missing."""
        wrong = {name: kind for name, kind in self.verdicts(read).items() if kind != "whole"}
        wrong = {name: kind for name, kind in wrong.items() if name not in absent or kind != "missing"}
        if wrong:
            raise DamagedError(self.complaint(wrong))

    def complaint(self, wrong: Mapping[str, str]) -> str:
        """What is wrong with files, and the ways out."""
        told = ", ".join(f"{self.folder / name}: {WORDS[kind]}" for name, kind in list(wrong.items())[:5])
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        way = f"put back what was written, or make it again; if it is meant, {self.meant}"
        return f"{told}{more} (by the hashes in {self.document}); {way}"

    def _extra(self) -> Iterator[str]:
        for top in self.folders:
            for name, path in files_of(self.folder / top).items():
                full = path.relative_to(self.folder).as_posix()
                hidden = any(part.startswith(".") for part in Path(name).parts)
                if full not in self.digests and name.endswith(LOADED) and name not in SIDE and not hidden:
                    yield full


WORDS = {
    "changed": "is not what was written",
    "missing": "is missing",
    "unreadable": "cannot be read",
    "extra": "was not written with the others",
}


def record_of_run(folder: Path) -> Record | None:
    """Of all files of a run. None if it is no run, or has no hashes."""
    manifest = _load(folder / MANIFEST, Manifest)
    if manifest is None or manifest.files is None:
        return None
    meant = f"`qft report --verify --accept {quote(str(folder))}` records it as it is"
    return Record(folder, manifest.files, MANIFEST, meant, RESULTS)


def require_whole_run(folder: Path) -> None:
    """Raise DamagedError unless a run's recipe and rows are as it wrote them. Without its rows, its data is read."""
    if record := record_of_run(folder):
        record.part("recipe.yaml").require_whole()
        record.part("rows.jsonl").require_whole(absent=("rows.jsonl",))


def record_of(path: Path) -> Record | None:
    """Of an adapter or a model, a folder or one file of it: of a run, an export or a version. None if nothing was
    recorded of it."""
    folder, file = (path.parent, path.name) if path.is_file() else (path, "")
    found = _beside(folder) or _within(folder)
    if found and file:
        found = found.part(file if found.folder == folder else f"{folder.name}/{file}")
    return found if found and found.digests else None


def unverified(part: Path) -> str | None:
    """What to tell of an adapter or a model of a run of which no hashes were recorded."""
    if record_of(part) or not _load(part.parent / MANIFEST, Manifest):
        return None
    return f"{part}: the run has no hashes of what it wrote, so it cannot be verified"


def _beside(folder: Path) -> Record | None:
    """By the manifest of the run or the version that it lies in."""
    for place in dict.fromkeys((Path(os.path.abspath(folder)), folder.resolve())):
        run = record_of_run(place.parent)
        if run and (part := run.part(place.name)).digests:
            return part
        version = _load(place.parent / MANIFEST, VersionManifest)
        if version and version.sha256 and place.name == "artifact":
            meant = f"use a copy of the folder without its {EXPORT}"
            return Record(place, version.sha256, f"../{MANIFEST}", meant)
    return None


def _within(folder: Path) -> Record | None:
    exported = _load(folder / EXPORT, _Exported)
    if exported is None:
        return None
    return Record(folder, exported.sha256, EXPORT, f"remove {folder / EXPORT}, which vouches for it")


def _load(path: Path, kind: type[Document]) -> Document | None:
    try:
        return kind.model_validate_json(read_file(path))
    except (OSError, ValidationError):
        return None
