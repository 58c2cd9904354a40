"""The disk: what it refuses and what to do about it, and whether it has room."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    "ELOOP", "EMFILE", "ENFILE",
)  # fmt: skip
"""What the system refuses, rather than that a program asks for the wrong thing."""
WRAPPED = [
    (re.escape(f"(os error {number})") + "|" + re.escape(os.strerror(number)), number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE)
]
"""How libraries tell of the system's errors in their own."""
TORCH_FAILED = r"PytorchStreamWriter|unexpected pos \d+ vs|iostream error"
"""What torch.save says of any of them."""
LARGE = 16 * 2**20
"""Bytes of a file that is tried where one could not be written."""
UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


def refusal(error: OSError, otherwise: str | Path = "") -> str:
    """What the system says of a file (or of `otherwise`, if it names none), and what to do about it."""
    name = errno.errorcode.get(error.errno or 0, "")
    what = REFUSALS.get(name) or error.strerror or first_line(error)
    where = error.filename2 if error.filename2 is not None else error.filename
    place = os.fsdecode(where) if isinstance(where, str | bytes | Path) else str(otherwise)
    return f"{place}: {what}" if place else what


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
    """Around what writes into `folder` or reads it: a refusal of its disk is a RunError that says so, whatever was made
    of it on the way."""
    try:
        yield
    except Exception as error:
        if told := disk_failure(error, folder):
            raise told from error
        raise


def disk_failure(error: BaseException, folder: Path) -> RunError | None:
    """What to say if writing into `folder` failed because of its disk; None for other errors. Libraries (safetensors,
    tokenizers, torch) make errors of their own of the system's, some without its number."""
    for cause in causes(error, in_context=True):
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
