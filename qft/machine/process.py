"""Another program, run within limits: it ends with this one, and all that it has started with it."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""
LONGEST_LINE = 2**16
"""Characters that are read at once."""
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Silent(Exception):
    """A program that has said nothing for too long, and was ended."""


class Watched:
    """A program whose words are read; it may be silent for `seconds`."""

    def __init__(self, running: subprocess.Popen[str], seconds: float) -> None:
        self.running, self.seconds = running, seconds
        self.silent = False

    def lines(self) -> Iterator[str]:
        """What it says, to the end. Raises Silent."""
        stream = self.running.stdout or self.running.stderr
        assert stream is not None
        timer = self._timer()
        try:
            while line := stream.readline(LONGEST_LINE):
                timer.cancel()
                timer = self._timer()
                yield line
        finally:
            timer.cancel()
        if self.silent:
            raise Silent

    def await_end(self) -> None:
        """Until it has ended, or its time is up. It is not yet reaped, so that its group is still its own."""
        deadline = time.monotonic() + self.seconds
        while not self.has_ended() and time.monotonic() < deadline:
            time.sleep(0.02)

    def has_ended(self) -> bool:
        return os.waitid(os.P_PID, self.running.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    def stop(self, seconds: float) -> None:
        """Ask it to end, and wait so long for that."""
        if not self.has_ended():
            os.kill(self.running.pid, signal.SIGTERM)
        self.seconds = seconds
        self.await_end()

    def _timer(self) -> threading.Timer:
        timer = threading.Timer(self.seconds, self._end)
        timer.daemon = True
        timer.start()
        return timer

    def _end(self) -> None:
        self.silent = True
        end_group(self.running)


@contextmanager
def started(
    command: Sequence[str],
    *,
    silence: float,
    all_words: bool = False,
    orphaned: signal.Signals = signal.SIGKILL,
    **options: Any,
) -> Iterator[Watched]:
    """Run a program in a group of its own, which is ended when the block is left: at the latest when it has been silent
    for `silence` seconds. What it says is its standard error, or with `all_words` its standard output too. `orphaned`
    is what it gets should this process die; what it has started itself does not. Raises OSError if it cannot be run."""
    pipes = (subprocess.PIPE, subprocess.STDOUT) if all_words else (subprocess.DEVNULL, subprocess.PIPE)
    running = subprocess.Popen(  # noqa: S603  # a list, and the program that the caller names
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=pipes[0],
        stderr=pipes[1],
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=partial(_end_with_parent, orphaned) if LIBC else None,  # calls the system and nothing else
        **options,
    )
    with running:
        try:
            watched = Watched(running, silence)
            yield watched
            watched.await_end()
        finally:
            end_group(running)


def end_group(running: subprocess.Popen[str]) -> None:
    """End a program and what it has started; nothing if all have ended."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(running.pid, signal.SIGKILL)


def _end_with_parent(number: signal.Signals) -> None:
    """In the child, before the program: get that signal when the parent dies, however that comes."""
    assert LIBC is not None
    LIBC.prctl(DEATH_SIGNAL, number)
