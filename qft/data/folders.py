"""Folders of rows: what `datasets` saved, and why others are no source."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset, DatasetDict, load_from_disk

from qft.errors import DataError, first_line
from qft.files import sha256
from qft.recipe.spread import SAVED, kind


def is_saved(path: Path) -> bool:
    """Whether `datasets` saved the folder."""
    return path.is_dir() and any((path / name).exists() for name in SAVED)


def saved(path: Path, split: str) -> tuple[Dataset, str]:
    """What such a folder holds, of several splits that one, and a digest of its files. Raises DataError."""
    try:
        found = load_from_disk(str(path))
        digest = hashlib.sha256("".join(sha256(each) for each in sorted(path.rglob("*.arrow"))).encode()).hexdigest()
    except Exception as error:  # whatever the files hold
        raise DataError(f"{path}: cannot be read as what `datasets` saved: {first_line(error)}") from error
    if not isinstance(found, DatasetDict):
        return found, digest
    if split not in found:
        raise DataError(f"{path}: holds the splits {', '.join(found)}, and none is called {split}: set split")
    return found[split], digest


def unread(folder: Path, known: Iterable[str]) -> str:
    """Why the files of another folder are no source."""
    kinds = sorted({kind(str(each)) for each in folder.rglob("*")} & {*known})
    if not kinds:
        return "a folder"
    pattern = f"{folder.name}/*{kinds[0]}"
    return f"a folder of {' and '.join(kinds)} files: name those that are meant by a pattern, such as {pattern}"
