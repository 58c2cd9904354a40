"""Standard output and error, where who reads them may be gone before the work is done."""

import errno
import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_lasting = False


def outlive_readers() -> None:
    """Let standard output and error outlive the terminal that they go to: what is written goes nowhere then. A shell
    learns that its terminal is gone before its jobs do, so a write may fail before SIGHUP comes, or without (`disown`).
    So it is with a pipe's reader, but only `while_it_lasts`: else BrokenPipeError is raised."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if os.name == "posix" and isinstance(stream, io.TextIOWrapper) and not _is_file(stream.fileno()):
            stream.flush()
            raw = _Lasting(stream.fileno(), "wb", closefd=False)
            ways = {way: getattr(stream, way) for way in ("encoding", "errors", "line_buffering", "write_through")}
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), **ways))


@contextmanager
def while_it_lasts() -> Iterator[None]:
    """Within it no pipe's end ends the work: Ctrl-C on `qft train recipe.yaml | tee log` reaches tee, too."""
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
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO and not (error.errno == errno.EPIPE and _lasting):
                raise
        _leave(self.fileno())
        if self.fileno() == 1:
            with suppress(OSError):
                os.write(2, b"\nnobody reads standard output any more; the work goes on\n")
        return memoryview(data).nbytes


def _is_file(number: int) -> bool:
    return stat.S_ISREG(os.fstat(number).st_mode)


def _leave(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
