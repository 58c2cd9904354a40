"""What was read of large files, kept for the next command: transformers takes half a minute for the vocabulary of a
GGUF file, if it has 262,000 words, and a model's weights are hashed in seconds.

An entry is a folder of JSON, named by the SHA-256 of all that it was made of. Any of it can be deleted at any time, and
one that is not as it was written is made anew. QFT_CACHE=off keeps nothing, and QFT_CACHE=FOLDER keeps it there
rather than in the user's cache folder.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from qft import __version__
from qft.checkpoint.header import header
from qft.files import atomic_folder, cache_folder, sha256, write_json

Value = TypeVar("Value")

MAX_BYTES = 512 * 2**20
"""Of all entries; those not used for longest are removed."""
SUMS = "sha256.json"
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "tekken.json", "*.model",
    "chat_template*", "additional_chat_templates/*",
)  # fmt: skip


def kept(
    path: Path,
    part: str,
    read: Callable[[], Value],
    write: Callable[[Value, Path], None],
    restore: Callable[[Path], Value],
) -> Value:
    """The `part` of the GGUF file at `path` that `read` gives, from an entry that `write` wrote where there is one."""
    return kept_at(_entry(path, part), read, write, restore)


def kept_at(
    entry: Path | None,
    read: Callable[[], Value],
    write: Callable[[Value, Path], None],
    restore: Callable[[Path], Value],
) -> Value:
    """What `read` gives, from the entry at that path if it is there; None: it is not kept."""
    if entry is None:
        return read()
    # Its sums are compared when all is read: then nobody has removed or changed a file in between.
    with suppress(Exception):  # whatever is wrong with an entry, it is made anew
        value = restore(entry)
        if _sums(entry) == json.loads((entry / SUMS).read_bytes()):
            os.utime(entry)
            return value
    value = read()
    with suppress(Exception):  # no room, or nothing that can be read back from JSON: then it is not kept
        _keep(value, entry, write, restore)
        _make_room(entry.parent)
    return value


def _keep(value: Value, entry: Path, write: Callable[[Value, Path], None], restore: Callable[[Path], Value]) -> None:
    """Write an entry. Raises ValueError if the value would not be read back as it is."""
    with TemporaryDirectory() as other, atomic_folder(entry) as folder:
        write(value, folder)
        sums = _sums(folder)
        write(restore(folder), Path(other))
        if _sums(Path(other)) != sums:
            raise ValueError(f"{entry}: reads back otherwise")
        write_json(folder / SUMS, sums)


def _make_room(folder: Path) -> None:
    total = 0
    for entry in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True):
        total += sum(path.stat().st_size for path in entry.glob("*"))
        if total > MAX_BYTES:
            shutil.rmtree(entry, ignore_errors=True)


def _sums(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir() if path.name != SUMS}


def companions(path: Path) -> list[Path]:
    """The files that transformers reads as well where they lie beside the GGUF file at `path`."""
    beside = (file for pattern in COMPANIONS for file in sorted(path.parent.glob(pattern)))
    return [file for file in beside if file.is_file() and file != path]


def _entry(path: Path, part: str) -> Path | None:
    """Where that part of the file is kept; None if nothing is kept of it. Raises ModelError for a broken file."""
    folder = cache_folder()
    if folder is None:
        return None
    digest = hashlib.sha256(f"{part} {__version__}".encode())
    for package in ("transformers", "tokenizers", "gguf"):
        digest.update(version(package).encode())
    with path.open("rb") as stream:
        digest.update(stream.read(header(path).end))
    for file in companions(path):
        digest.update(f"{file.name} {sha256(file)}".encode())
    return folder / "gguf" / digest.hexdigest()
