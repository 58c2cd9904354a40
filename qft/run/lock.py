"""One process at a time in a folder.

The lock is the system's (flock) on a file in the folder, so that a kill lets go of it; the file says who has it. Where
the file system knows no such locks, what another file says decides: whether that process still lives.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from qft.disk import disk_failures
from qft.documents.part import Seconds, Stored
from qft.errors import BusyError, DamagedError, GateError, RunError
from qft.files import is_living, now, process_start, remove_leftovers

LOCK, HELD = ".qft.lock", ".qft.held"
"""The file that is locked, and the one that stands for it where none can be."""
RESERVED = 64 * 2**10
"""Bytes that the file takes, so that how a command ended can be written on a disk that it has filled."""
ATTEMPTS, PAUSE = 10, 0.05
_HANDLES: set[int] = set()
"""Of this process. A child that it forks must not keep them."""


class Holder(Stored):
    """The process that holds a folder: the first line of its lock file."""

    schema_version: Literal[1] = 1
    kind: Literal["lock"] = "lock"
    command: str
    pid: int
    host: str
    process_started: Seconds
    """Since 1970: another process may have got that number since."""
    since: str

    @property
    def lives(self) -> bool:
        """Whether it may still be at work; of another machine that cannot be known."""
        return self.host != socket.gethostname() or is_living(self.pid, int(self.process_started))

    def __str__(self) -> str:
        return f"`{self.command}` (process {self.pid} on {self.host}, since {self.since})"


@contextmanager
def locked(folder: Path, command: str) -> Iterator[None]:
    """Hold `folder`, which is made if it is not there, and removed again if nothing came into it. What killed commands
    left behind in it is removed.

    Raises BusyError at once if a living process holds it, RunError if it cannot be written."""
    with disk_failures(folder):
        if folder.exists() and not folder.is_dir():
            raise RunError(f"{folder}: is a file, and is to be written into; give a folder")
        made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        with disk_failures(folder):
            handle = _acquire(folder, command)
        owner = os.getpid()
        try:
            remove_leftovers(folder)
            with disk_failures(folder):
                yield
        finally:
            if os.getpid() == owner:
                _release(folder, handle)
    except DamagedError:
        raise
    except GateError:  # the work was done, if in vain
        made.clear()
        raise
    finally:
        with suppress(OSError):  # of one that is not empty
            for path in made:
                path.rmdir()


def release_room(folder: Path) -> None:
    """Let go of the room that the lock takes, for how the command ended to be written there."""
    for name in (LOCK, HELD):
        with suppress(OSError):
            os.truncate(folder / name, (folder / name).stat().st_size - RESERVED)


def require_free(*folders: Path) -> None:
    """Raise BusyError if a living process holds one of the folders."""
    for folder in folders:
        held = (folder / HELD).exists() and (holder := _holder(folder / HELD)) and holder.lives
        if held:
            raise _busy(folder, holder, folder / HELD)
        if (folder / LOCK).is_file() and (handle := _try(folder)) is not None:
            os.close(handle)


def require_ours(folder: Path) -> None:
    """Raise BusyError if another process holds the folder by now: it was moved or removed while this one is at work in
    it, and writes there again."""
    for name in (LOCK, HELD):
        with suppress(OSError):
            there = os.stat(folder / name)
            if any(os.path.samestat(os.fstat(handle), there) for handle in _HANDLES):
                return
    try:
        require_free(folder)
    except BusyError as error:
        raise BusyError(f"{error} (the folder that this command held was moved away or removed)") from None


def _acquire(folder: Path, command: str) -> int:
    """The handle of the locked file, which says whose it is."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # who had made the folder has removed it
            handle = _try(folder)
            if handle is not None:
                break
    try:
        _write(handle, command)
    except BaseException:
        _release(folder, handle)
        raise
    return handle


def _try(folder: Path) -> int | None:
    """The handle of the file, locked; None if it was removed meanwhile. Raises BusyError if another has it."""
    import fcntl  # Unix only

    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    for attempt in range(ATTEMPTS):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # for a moment, if another only asks; and a holder says at once who it is
            time.sleep(PAUSE)
            if attempt + 1 == ATTEMPTS:
                os.close(handle)
                raise _busy(folder, _holder(folder / LOCK)) from None
        except OSError:
            os.close(handle)
            return _without_flock(folder)
        else:
            break
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(handle), os.stat(folder / LOCK)):
            return handle
    os.close(handle)
    return None


def _without_flock(folder: Path) -> int:
    """The handle of HELD, made anew. Raises BusyError if it is there and its process is not known to be over."""
    path = folder / HELD
    (folder / LOCK).unlink(missing_ok=True)
    if path.exists():
        holder, aside = _holder(path), path.with_name(f"{HELD}.{os.getpid()}")
        if holder is None or holder.lives:
            raise _busy(folder, holder, path)
        os.replace(path, aside)
        if _holder(aside) != holder:  # another was quicker, and this is its
            os.replace(aside, path)
            raise _busy(folder, _holder(path), path)
        aside.unlink()
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        raise _busy(folder, _holder(path), path) from None


def _write(handle: int, command: str) -> None:
    """Say whose the lock is, and reserve room."""
    started = float(process_start(os.getpid()) or 0)
    holder = Holder(command=command, pid=os.getpid(), host=socket.gethostname(), process_started=started, since=now())
    line = holder.model_dump_json().encode() + b"\n"
    os.ftruncate(handle, 0)
    os.pwrite(handle, line, 0)
    os.pwrite(handle, b"\n" * RESERVED, len(line))
    _HANDLES.add(handle)


def _holder(path: Path) -> Holder | None:
    """What the file says; None if it cannot be read."""
    with suppress(OSError, ValueError):
        return Holder.model_validate_json(path.read_bytes().partition(b"\n")[0])
    return None


def _busy(folder: Path, holder: Holder | None, file: Path | None = None) -> BusyError:
    who = str(holder) if holder else "another process"
    over = f"; if that process is over, delete {file}" if file else ""
    return BusyError(f"{folder}: {who} is at work here; wait for it to end, or name another folder{over}")


def _release(folder: Path, handle: int) -> None:
    """Remove the file before another can have it."""
    _HANDLES.discard(handle)
    with suppress(OSError):
        for name in (LOCK, HELD):
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(folder / name)):
                    (folder / name).unlink()
    os.close(handle)


def _let_go() -> None:
    for handle in _HANDLES:
        with suppress(OSError):
            os.close(handle)
    _HANDLES.clear()


os.register_at_fork(after_in_child=_let_go)
