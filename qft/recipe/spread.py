"""A pattern, or a folder of files, -> the data files that it means, in the order of their names."""

import glob
import os
import re
from collections.abc import Iterator

PACKED = (".gz", ".zst")
COLUMNS = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
TEXTS = (".txt", ".md")
DATABASES = (".db", ".sqlite", ".sqlite3")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
"""What an address begins with."""
SAVED = ("state.json", "dataset_dict.json")
"""One of which is in a folder that `datasets` saved, which is one source."""


def spread(path: str) -> list[str]:
    """The files of a pattern (`rows/*.jsonl`), or of a folder whose files are of one kind; any other path alone."""
    if os.path.isdir(path):
        found = [] if is_saved(path) else sorted(_files(path))
        return found if len({kind(each) for each in found}) == 1 else [path]
    if os.path.isabs(path) and glob.has_magic(path) and not os.path.lexists(path):
        return sorted(each for each in glob.glob(path, recursive=True) if os.path.isfile(each)) or [path]
    return [path]


def is_saved(path: str) -> bool:
    """Whether `datasets` saved the folder."""
    return any(os.path.exists(os.path.join(path, name)) for name in SAVED)


def is_local(path: str) -> bool:
    """Whether it names a place on this machine, and no hub dataset."""
    return os.path.isabs(path) or kind(path) in (*COLUMNS, *TEXTS, *DATABASES)


def kind(path: str) -> str:
    """Its suffix, without that of what packs it."""
    name = path.lower()
    packed = next((suffix for suffix in PACKED if name.endswith(suffix)), "")
    return os.path.splitext(name.removesuffix(packed))[1]


def _files(folder: str) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in names if kind(name) in COLUMNS and name[0] not in "._")
