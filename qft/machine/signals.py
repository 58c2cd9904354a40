"""Signals as a wish to stop: heard where work can stop, or at once."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from qft.errors import Interrupted
from qft.machine.streams import leave_dead_terminals, while_it_lasts

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
"""The last three are what batch systems send before the end (`sbatch --signal=USR1@600`), and else end a process."""
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class Signals:
    """What signals ask of the work: to stop at its next good place if it `waits` for that; else at once."""

    def __init__(self) -> None:
        self.waits = False
        """Whether the work looks at `asked` itself."""
        self.promise = ""
        """What is said to a signal that waits."""
        self.asked: str | None = None
        """Name of the first signal that came."""
        self.same_within = 0.0
        """Seconds within which a second signal is the first once more: a launcher and a scheduler both send it."""
        self._since = 0.0
        self._process = os.getpid()

    def wait(self, promise: str) -> None:
        """From now on a signal waits for what is promised."""
        self.waits, self.promise = True, promise

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.asked:
            raise Interrupted(self.asked)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it no signal waits."""
        waited, self.waits = self.waits, False
        try:
            self.check()
            yield
        finally:
            self.waits = waited

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Within it signals are heard, in the main thread; those that the process was started to ignore stay so. No
        pipe's end ends the work."""
        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in SIGNALS if main}
        heard = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
        try:
            for number in heard:
                signal.signal(number, self._hear)
            with while_it_lasts():
                yield
        finally:
            for number, old in heard.items():
                signal.signal(number, old)

    def _hear(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if os.getpid() != self._process:  # a forked process that has its parent's handlers
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        leave_dead_terminals()
        if self.asked and time.monotonic() - self._since < self.same_within:
            return
        self._since = time.monotonic()
        if self.asked or not self.waits:
            second, self.asked = self.asked is not None, name
            raise Interrupted(name, hard=second)
        self.asked = name
        with suppress(OSError):  # not through a stream, which this may have come in the midst of
            os.write(2, f"\n{name}: {self.promise}; a second signal ends at once\n".encode())


class Deaf:
    """`worker_init_fn` of a DataLoader whose workers are ended by their parent alone: a signal for the run often goes
    to all of its processes, and would take the batches from under the step."""

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then
        """What else the worker begins with."""

    def __call__(self, worker: int) -> None:
        for number in set(SIGNALS) - {signal.SIGTERM}:
            signal.signal(number, signal.SIG_IGN)
        if hasattr(signal, "sigwaitinfo"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_end_by_parent, daemon=True).start()
        if self.then:
            self.then(worker)


def _end_by_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
