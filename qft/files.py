"""Atomic writes, content hashes and free space: what a run needs of the file system."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from qft.errors import RunError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling file that becomes `path` on success and vanishes on failure: `path` holds the old
    content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8), atomically."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)


def write_json(path: Path, document: Any) -> None:
    """Write `document` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `path` on success and vanishes on failure. What was there before is
    moved aside first: at any moment `path` is the old one whole, the new one whole, or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        _put_in_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _put_in_place(folder: Path, path: Path) -> None:
    """Rename `folder` to `path`, in the place of what is there; if that fails, what was there is there again."""
    if not path.exists():
        os.replace(folder, path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    os.replace(path, old)
    try:
        os.replace(folder, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


Verdict = Literal["whole", "changed", "missing", "unreadable"]


def verdict(path: Path, digest: str | None, read: Callable[[Path], str] = sha256) -> Verdict:
    """Whether the file hashes to `digest`."""
    try:
        if not path.is_file():
            return "changed" if os.path.lexists(path) else "missing"
        return "whole" if read(path) == digest else "changed"
    except OSError:
        return "unreadable"


def files_of(folder: Path) -> dict[str, Path]:
    """Every file below a folder, by its path within it."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}


def now() -> str:
    """The time in UTC, to the second, as ISO 8601 has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def nearest_folder(folder: Path) -> Path:
    """`folder`, or what is there of the folders that will hold it."""
    return next(p for p in [folder, *folder.absolute().parents] if p.exists())


def free_bytes(folder: Path) -> int:
    """Free on the disk that holds `folder`, or will."""
    return shutil.disk_usage(nearest_folder(folder)).free


def same_disk(one: Path, other: Path) -> bool:
    """Whether one disk holds both folders, or will."""
    return nearest_folder(one).stat().st_dev == nearest_folder(other).stat().st_dev


def require_free_space(folder: Path, needed: int, what: str) -> None:
    """Raise RunError unless the disk that will hold `folder` has `needed` bytes free for `what`."""
    free = free_bytes(folder)
    if free < needed:
        raise RunError(
            f"{folder}: {what} needs {needed / 2**30:.1f} GiB and the disk has {free / 2**30:.1f} GiB free; "
            "free some space, or write to another disk"
        )
