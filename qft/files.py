"""Files: written atomically, read and hashed, and what killed processes leave of them."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

from qft.errors import MissingError

KINDS = {stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
CLOCK_DRIFT = 5
"""Seconds by which the start of one process can be told differently, as the clock is set."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""What the small files begin with that a clone without Git LFS has."""
TEMPORARY = re.compile(r"\.(.*)\.qft-(old-)?(\d+)-(\d+)-\w{8}", re.DOTALL)
"""A temporary file or folder: for what, whether it is what was there before, and its process's number and start."""
LONGEST = 200
"""Bytes of a name that is told whole in that of a temporary file; file systems allow 255 in all."""


def not_a_file(path: Path) -> str | None:
    """What the path names instead of a file or a folder, such as a pipe, from which reading might never end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return None
    return next((name for is_kind, name in KINDS.items() if is_kind(mode)), None)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling file that becomes `path` on success and vanishes on failure: `path` holds the old
    content or the new one, never a part. Who may read it is as the umask says, whatever a library that writes it has
    made of that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path.name))
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    mode = stat.S_IMODE(os.fstat(handle).st_mode)
    os.close(handle)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(mode)
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
def atomic_folder(path: Path, stays: Callable[[str], bool] | None = None) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `path` on success and vanishes on failure. What was there before is
    moved aside first: at any moment `path` is the old one whole, the new one whole, or absent; files of it that `stays`
    says so of, by their paths within it, are in the new one too. Raises NotADirectoryError for what is there and is no
    folder."""
    if os.path.lexists(path) and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path.name))
    temporary.mkdir()
    try:
        yield temporary
        if stays:
            _copy_missing(path, temporary, stays)
        for file in files_of(temporary).values():
            if not file.is_symlink():
                file.chmod(temporary.stat().st_mode & 0o666)
        _put_in_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _copy_missing(folder: Path, to: Path, stays: Callable[[str], bool]) -> None:
    """Copy files of a folder that `stays` says so of, and that are not there yet."""
    for name, file in files_of(folder).items():
        if stays(name) and not os.path.lexists(to / name):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, to / name, follow_symlinks=False)


def _put_in_place(folder: Path, path: Path) -> None:
    """Rename `folder` to `path`, in the place of what is there; if that fails, what was there is there again."""
    if not path.exists():
        os.replace(folder, path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path.name, "old-")))
    try:
        os.replace(path, old)
    except BaseException:
        old.rmdir()
        raise
    try:
        os.replace(folder, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read_file(path: Path) -> bytes:
    """Its bytes. Raises OSError for what is no file, such as a pipe, that would be waited for."""
    if os.path.lexists(path) and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return path.read_bytes()


def require_regular(path: Path) -> Path:
    """The path, unless reading it might never end. Raises MissingError."""
    if kind := not_a_file(path):
        raise MissingError(f"{path}: it is {kind}, and a file is needed there")
    return path


def require_pulled(path: Path) -> None:
    """Raise MissingError for what a clone has in place of a file that Git LFS holds."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise MissingError(f"{path}: is a pointer of Git LFS, and not the file itself: run `git lfs pull` there")


def require_regular_files(folder: Path) -> None:
    """Raise MissingError if any entry of the folder is a pipe or a device."""
    for path in sorted(folder.iterdir()):
        require_regular(path)


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a temporary folder in `parent`, which is gone afterwards; or, after a kill, with `remove_leftovers`."""
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=_prefix(name)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders in `folder` whose process is over. What one had moved aside and not
    replaced is put back."""
    with suppress(OSError):
        for path in [*folder.iterdir()]:
            match = TEMPORARY.fullmatch(path.name)
            if match and not is_living(int(match[3]), int(match[4])):
                _put_back(path, match[1]) if match[2] else _remove(path)


def _put_back(old: Path, name: str) -> None:
    """Give a folder that was moved aside its name again, or remove it if another one has it."""
    path = old.with_name(name)
    if path.exists() or not any(old.iterdir()):
        _remove(old)
    elif len(name.encode()) < LONGEST:
        os.replace(old, path)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def remove_folder(folder: Path, stays: Callable[[str], bool]) -> list[Path]:
    """Remove a folder but for the files and links that `stays` says so of, by their paths within it. Returns those."""
    found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    left = [path for path in found if stays(path.relative_to(folder).as_posix())]
    if not left:
        shutil.rmtree(folder, ignore_errors=True)
        return []
    for path in set(found) - set(left):
        with suppress(OSError):  # as above
            path.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        with suppress(OSError):  # of one that is not empty, or no folder
            path.rmdir()
    return sorted(left)


def is_living(pid: int, started: int) -> bool:
    """Whether the process of this machine that had that number then is still there, and no later one has it."""
    began = process_start(pid)
    return began is not None and abs(began - started) <= CLOCK_DRIFT


def process_start(pid: int) -> int | None:
    """When it began, in seconds since 1970; None if there is no such process, or it is over and not yet waited for."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else int(process.create_time())
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return int(process.create_time())


def _prefix(name: str, kind: str = "") -> str:
    """Of a temporary name for `name`: it says whose it is, and is not longer than file systems allow."""
    short = name.encode()[:LONGEST].decode(errors="ignore")
    return f".{short}.qft-{kind}{os.getpid()}-{_own_start(os.getpid())}-"


def temporary_name(name: str) -> str:
    """For what `remove_leftovers` is to remove, should this process not do it."""
    return f"{_prefix(name)}{secrets.token_hex(4)}"


@cache
def _own_start(pid: int) -> int:
    """Of this process; by its number, which is another one after a fork."""
    return process_start(pid) or 0


def cache_folder() -> Path | None:
    """Of this user; None if nothing is to be kept."""
    where = os.environ.get("QFT_CACHE")
    if where:
        return None if where == "off" else Path(where)
    with suppress(RuntimeError):  # this user has no home
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qft"
    return None


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes. Raises MissingError for a pipe or device, which never ends."""
    with require_regular(path).open("rb") as stream:
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


def read_json_text(text: str) -> Any:
    """The value of JSON text. Raises ValueError for what is none, and for a key that an object has twice."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)}: given twice")
    return made


def now() -> str:
    """The time in UTC, to the second, as ISO 8601 has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
