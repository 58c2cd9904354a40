"""Folders of rows: what `datasets` saved, and why others are no source."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset, load_from_disk

from qft.errors import DataError, first_line
from qft.files import sha256
from qft.recipe.spread import kind


def saved(path: Path, split: str) -> tuple[Dataset, str]:
    """What such a folder holds, of several splits that one, and a digest of its files. Raises DataError."""
    parts, folder = path / "dataset_dict.json", path
    try:
        splits = json.loads(parts.read_text())["splits"] if parts.exists() else None
        if splits is not None and split not in splits:
            raise DataError(f"{path}: holds the splits {', '.join(splits)}, and none is called {split}: set split")
        if splits is None and split != "train":
            raise DataError(f"{path}: holds one set of rows, and none is called {split}: remove split")
        folder = path if splits is None else path / split
        if not json.loads((folder / "state.json").read_text())["_data_files"]:
            raise DataError(f"{folder}: holds no row")
        found = load_from_disk(str(folder))
        digest = hashlib.sha256("".join(sha256(each) for each in sorted(path.rglob("*.arrow"))).encode()).hexdigest()
    except DataError:
        raise
    except Exception as error:  # whatever the files hold
        raise DataError(f"{folder}: cannot be read as what `datasets` saved: {first_line(error)}") from error
    return found, digest


def unread(folder: Path, known: Iterable[str]) -> str:
    """Why the files of another folder are no source."""
    kinds = sorted({kind(str(each)) for each in folder.rglob("*")} & {*known})
    if not kinds:
        return "a folder"
    pattern = f"{folder.name}/*{kinds[0]}"
    return f"a folder of {' and '.join(kinds)} files: name those that are meant by a pattern, such as {pattern}"
