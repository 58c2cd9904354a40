"""An engine's own server, started on this machine for as long as it is asked."""

from __future__ import annotations

import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from qft.errors import ModelError, ServerError
from qft.machine.elsewhere import last_words
from qft.machine.process import Watched, end_group, started
from qft.serving.client import Server

START_SECONDS = 3600
"""Until it answers: it loads a model meanwhile."""
STOP_SECONDS = 5
"""That it may take to give back what it holds."""
CAUSE = re.compile(r"(?:\(.*?\) ERROR .*?\] )?(\w*(?:Error|Exception): .*\S)")
"""A line that names one, with or without what vLLM's log puts before it. What failed first is said first."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def running(command: Sequence[str], server: Server, who: str, environment: Mapping[str, str]) -> Iterator[None]:
    """Run `command` until the block is left; within it, the server answers. Raises ModelError, which begins with
    `who`, with the reason of one that ends before."""
    how: dict[str, Any] = {"silence": threading.TIMEOUT_MAX, "all_words": True, "env": environment}
    with started(command, orphaned=signal.SIGTERM, **how) as program:  # to end its own processes
        said: list[str] = []
        reader = threading.Thread(target=_keep, args=(program, said), daemon=True)
        reader.start()
        try:
            _await_answer(program, server, who)
            yield
        except ServerError as error:
            if not program.has_ended():
                raise
            reader.join(STOP_SECONDS)
            raise ModelError(f"{who}: {_reason(said)}") from error
        finally:
            program.stop(STOP_SECONDS)
            end_group(program.running)
            reader.join(STOP_SECONDS)


def _await_answer(program: Watched, server: Server, who: str) -> None:
    """Raises ServerError if it ends before."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with suppress(ServerError):
            server.models()
            return
        if program.has_ended():
            raise ServerError(f"{who} has ended")
        time.sleep(0.1)
    raise ServerError(f"{who} gave no answer within {START_SECONDS / 3600:g} h")


def _keep(program: Watched, said: list[str]) -> None:
    """The first line that names a cause, and the last."""
    with suppress(ValueError):  # closed, by a second Ctrl-C
        for line in program.lines():
            said[:] = [*said[: bool(said and CAUSE.match(said[0]))], line]


def _reason(said: list[str]) -> str:
    found = CAUSE.match(said[0]) if said else None
    return found[1] if found else last_words(said)
