"""What a model's files hash to: of bytes that were read, which for large files is remembered by path, size and times.

A name says nothing of the bytes: a blob of the hub's cache is called by the hash that it should have, and what does not
have it is damaged.
"""

import hashlib
import json
import os
import time
from pathlib import Path

from qft.checkpoint.cache import companions, kept_at
from qft.errors import DamagedError
from qft.files import cache_folder, sha256, write_json

LARGE = 64 * 2**20
"""Bytes from which on a digest is remembered: a smaller file is hashed as fast as its entry is read."""
DESCRIBED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "additional_chat_templates/*.jinja")
"""Everything that is read of a model's folder beside its weights; pickles are not among them."""
SETTLED = 2.0
"""Seconds since a file's last change. A change right after the reading could leave it the same times."""


def digest(path: Path) -> str:
    """Hex SHA-256 of the file's bytes as they are, or were when no other size or time was on it than now. Raises
    DamagedError for a blob of the hub's cache that is not what its name says."""
    real = path.resolve()
    found = kept_at(_entry(real), lambda: sha256(real), _write, _restore)
    _require_named(path, real, found)
    return found


def described(path: Path) -> list[Path]:
    """The files of DESCRIBED in a model's folder, or those that are read beside a GGUF file."""
    if not path.is_dir():
        return companions(path)
    return sorted(file for pattern in DESCRIBED for file in path.glob(pattern) if file.is_file())


def _write(value: str, folder: Path) -> None:
    write_json(folder / "digest.json", value)


def _restore(folder: Path) -> str:
    value: str = json.loads((folder / "digest.json").read_bytes())
    return value


def _entry(path: Path) -> Path | None:
    """Where the digest of the file as it is now is kept; None if it is not."""
    folder, stat = cache_folder(), path.stat()
    if folder is None or stat.st_size < LARGE or time.time() - max(stat.st_mtime, stat.st_ctime) < SETTLED:
        return None
    # No program sets the time of change, so a file cannot be written to and look as before.
    state = (os.fspath(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return folder / "sha256" / hashlib.sha256(repr(state).encode("utf-8", "surrogateescape")).hexdigest()


def _require_named(path: Path, blob: Path, found: str) -> None:
    """The hub's cache holds models--OWNER--NAME/blobs/HASH: SHA-256 for large files, for others Git's of a blob (some
    mirrors name them by their plain SHA-1)."""
    name = blob.name
    if blob == path or blob.parent.name != "blobs" or not blob.parent.parent.name.startswith("models--"):
        return
    wanted = {64: lambda: {found}, 40: lambda: _sha1s(blob)}.get(len(name))
    if wanted is None or name in wanted():
        return
    raise DamagedError(
        f"{path}: is damaged in the hub's cache: its bytes are not those that the hub has; remove {blob} and run this "
        "again with the hub in reach, which fetches it anew"
    )


def _sha1s(blob: Path) -> set[str]:
    content = blob.read_bytes()
    named = (b"blob %d\0" % len(content) + content, content)
    return {hashlib.sha1(part, usedforsecurity=False).hexdigest() for part in named}
