"""Atomic writes, content hashes and free space: what a run needs of the file system."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from qft.errors import QftError, RunError, causes, first_line

REFUSALS = {
    "ENOSPC": "the disk is full; free some space, or name a place on another disk",
    "EDQUOT": "the quota of the disk is used up; free some space, or name a place on another disk",
    "EFBIG": "the file grows larger than the system or `ulimit -f` allows",
    "EACCES": "permission is denied; change the permissions, or name another place",
    "EPERM": "the system does not permit it; change the permissions, or name another place",
    "EROFS": "the file system is read-only; name a place that can be written",
    "ENAMETOOLONG": "the name is too long for the file system; give a shorter one",
    "EISDIR": "it is a folder, and a file is needed there",
    "ENOTDIR": "a part of the path is a file, and a folder is needed there",
    "ENOTEMPTY": "the folder is not empty: something else writes there",
    "EEXIST": "something is there already",
    "ELOOP": "its links lead round in a circle",
    "EMFILE": "too many files are open; raise the limit (`ulimit -n`)",
    "ENFILE": "too many files are open on this machine",
    "EIO": "the disk fails to read or write; look at the system's log",
    "ESTALE": "the network's file system has lost it; try again",
    "EBUSY": "it is in use",
    "ETXTBSY": "it is being run",
    "EINVAL": "the file system does not take that name",
}
"""What the system refuses, by the name of its errno, and what to do about it."""
OF_DISK = (
    "ENOSPC", "EDQUOT", "EFBIG", "EROFS", "ENAMETOOLONG", "EIO", "EACCES", "EPERM", "ESTALE", "ENOTDIR", "EEXIST",
    "ELOOP",
)  # fmt: skip
"""What a disk refuses, rather than that a program asks for the wrong thing."""
WRAPPED = [
    (re.escape(f"(os error {number})") + "|" + re.escape(os.strerror(number)), number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
]
"""How libraries tell of the system's errors in their own."""
TORCH_FAILED = r"PytorchStreamWriter|unexpected pos \d+ vs|iostream error"
"""What torch.save says of any of them."""
LARGE = 16 * 2**20
"""Bytes of a file that is tried where one could not be written."""
UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
CLOCK_DRIFT = 5
"""Seconds by which the start of one process can be told differently, as the clock is set."""
TEMPORARY = re.compile(r"\.(.*)\.qft-(old-)?(\d+)-(\d+)-\w{8}", re.DOTALL)
"""A temporary file or folder: for what, whether it is what was there before, and its process's number and start."""
LONGEST = 200
"""Bytes of a name that is told whole in that of a temporary file; file systems allow 255 in all."""


def refusal(error: OSError, otherwise: str | Path = "") -> str:
    """What the system says of a file (or of `otherwise`, if it names none), and what to do about it."""
    name = errno.errorcode.get(error.errno or 0, "")
    what = REFUSALS.get(name) or error.strerror or first_line(error)
    where = error.filename2 if error.filename2 is not None else error.filename
    place = os.fsdecode(where) if isinstance(where, str | bytes | Path) else str(otherwise)
    return f"{place}: {what}" if place else what


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling file that becomes `path` on success and vanishes on failure: `path` holds the old
    content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path.name))
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
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path.name)))
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
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path.name, "old-")))
    os.replace(path, old)
    try:
        os.replace(folder, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


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


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
            f"{folder}: {what} needs {room(needed)} and the disk has {room(free)} free; "
            "free some space, or write to another disk"
        )


def room(count: int) -> str:
    """Bytes on a disk, in words."""
    unit = next((unit for unit in ("GiB", "MiB", "KiB") if count >= UNITS[unit]), "bytes")
    return f"{count / UNITS[unit]:.1f} {unit}" if unit != "bytes" else f"{count} bytes"


@contextmanager
def disk_failures(folder: Path) -> Iterator[None]:
    """Around what writes into `folder`: a refusal of its disk is a RunError that says so, whatever was made of it on
    the way."""
    try:
        yield
    except Exception as error:
        if told := disk_failure(error, folder):
            raise told from error
        raise


def disk_failure(error: BaseException, folder: Path) -> RunError | None:
    """What to say if writing into `folder` failed because of its disk; None for other errors. Libraries (safetensors,
    tokenizers, torch) make errors of their own of the system's, some without its number."""
    for cause in causes(error):
        if isinstance(cause, QftError):
            return None
        if isinstance(cause, OSError) and cause.errno:
            known = errno.errorcode.get(cause.errno) in OF_DISK
            return RunError(refusal(cause, _fuller(folder, cause.errno))) if known else None
        if number := next((number for pattern, number in WRAPPED if re.search(pattern, str(cause))), None):
            return RunError(refusal(OSError(number, os.strerror(number)), _fuller(folder, number)))
        if re.search(TORCH_FAILED, str(cause)):
            return RunError(_why_not_written(folder))
    return None


def _why_not_written(folder: Path) -> str:
    """What the disk says to a large file, where the library that could not write one kept it to itself."""
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            os.posix_fallocate(stream.fileno(), 0, LARGE)
    except OSError as error:
        return refusal(error, folder)
    return f"{folder}: a file could not be written, and torch does not say why: look at the disk's space and quota"


def _fuller(folder: Path, number: int) -> Path:
    """`folder`, or the one for temporary files if that is the one that is full."""
    folders = [folder, Path(tempfile.gettempdir())]
    return min(folders, key=free_bytes) if number in (errno.ENOSPC, errno.EDQUOT) else folder
