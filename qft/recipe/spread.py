"""A pattern, or a folder of files, -> the data files that it means, in the order of their names."""

import glob
import os
from collections.abc import Iterator

PACKED = (".gz", ".zst")
COLUMNS = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
TEXTS = (".txt", ".md")
SAVED = ("state.json", "dataset_dict.json")
"""One of which is in a folder that `datasets` saved, which is one source."""


def spread(path: str) -> list[str]:
    """The files of a pattern (`rows/*.jsonl`), or of a folder whose files are of one kind; any other path alone."""
    if os.path.isdir(path):
        found = [] if any(os.path.exists(os.path.join(path, name)) for name in SAVED) else sorted(_files(path))
        return found if len({kind(each) for each in found}) == 1 else [path]
    if os.path.isabs(path) and glob.has_magic(path) and not os.path.lexists(path):
        return sorted(each for each in glob.glob(path, recursive=True) if os.path.isfile(each)) or [path]
    return [path]


def kind(path: str) -> str:
    """Its suffix, without that of what packs it."""
    name = path.lower()
    packed = next((suffix for suffix in PACKED if name.endswith(suffix)), "")
    return os.path.splitext(name.removesuffix(packed))[1]


def _files(folder: str) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in names if kind(name) in COLUMNS and name[0] not in "._")
