"""Standard output and error, which may come to an end before the work does."""

import errno
import io
import os
import select
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_lasting = False


def outlive_readers() -> None:
    """Let standard output and error outlive the terminal that they go to: what is written goes nowhere then. A shell
    learns that its terminal is gone before its jobs do, so a write may fail before SIGHUP comes, or without (`disown`).
    So it is with whatever else takes no more, but only `while_it_lasts`: else OSError is raised."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if os.name == "posix" and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            raw = _Lasting(stream.fileno(), "wb", closefd=False)
            ways = {way: getattr(stream, way) for way in ("encoding", "errors", "line_buffering", "write_through")}
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), **ways))


def open_closed() -> None:
    """Have what was closed when this process was started (`2>&-`) lead nowhere: a file would get its number, and with
    it what a library of C writes to standard error."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


@contextmanager
def while_it_lasts() -> Iterator[None]:
    """Within it no output's end is that of the work: Ctrl-C on `qft train recipe.yaml | tee log` reaches tee, too, and
    the disk of a log may be full."""
    global _lasting
    before, _lasting = _lasting, True
    try:
        yield
    finally:
        _lasting = before


def leave_dead_terminals() -> None:
    """Send nowhere what anyone, a library of C too, writes to a terminal that hung up."""
    for number in (1, 2):
        try:
            os.write(number, b"")
        except OSError:
            _leave(number)


class _Lasting(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            while (written := super().write(data)) is None:  # another program made it one that does not wait
                select.select([], [self], [])
            return written
        except OSError as error:
            kind = os.fstat(self.fileno()).st_mode
            if not _lasting and not (error.errno == errno.EIO and stat.S_ISCHR(kind)):
                raise
            _leave(self.fileno())
            if self.fileno() == 1:
                with suppress(OSError):
                    said = f"nothing takes standard output any more ({error.strerror}); the work goes on"
                    os.write(2, f"\n{said}\n".encode())
            return memoryview(data).nbytes


def _leave(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
