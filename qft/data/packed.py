"""Files that are packed (gzip, Zstandard), as the files that they hold: unpacked once, by content, in the cache."""

import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from qft.files import atomic_file
from qft.recipe.spread import kind

OPENED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".zst": lambda path: pa.input_stream(str(path), compression="zstd"),
}


def unpacked(path: Path, digest: str, cache: Path) -> Path:
    """What a packed file of that SHA-256 holds, as a file in `cache`; any other as it is. Raises what reading a broken
    one does."""
    opened = OPENED.get(path.suffix.lower())
    if opened is None:
        return path
    found = cache / "unpacked" / f"{digest}{kind(str(path))}"
    if not found.exists():
        with opened(path) as stream, atomic_file(found) as temporary:
            with temporary.open("wb") as out:
                shutil.copyfileobj(stream, out, 2**20)
            os.utime(temporary, (0, 0))  # by which `datasets` knows it again
    return found
