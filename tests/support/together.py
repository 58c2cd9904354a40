"""Several processes that train together: forked from this one, as torchrun would have started them."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import IO, Any

from qft.training.recorder import Recorder
from tests.support.forked import Ended, command, fork

Before = Callable[[int], None]
"""What a process does first, told its rank."""


def together(path: Path, *arguments: Any, size: int = 2, before: Before = lambda rank: None) -> list[Ended]:
    """What became of `qft train` in each of `size` processes, which are not stopped where one of them ends."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(size)}
    variables |= {"LOCAL_WORLD_SIZE": str(size)}
    with ExitStack() as opened:
        nothing, *streams = [opened.enter_context(tempfile.TemporaryFile()) for _ in range(2 * size + 1)]

        def start(rank: int) -> ForkProcess:
            def work() -> None:
                before(rank)
                command("train", path, *arguments)()

            own = variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return fork(work, stdin=nothing, stdout=streams[rank], stderr=streams[size + rank], **own)

        processes = [start(rank) for rank in range(size)]
        return [_ended(each, streams[rank], streams[size + rank]) for rank, each in enumerate(processes)]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _ended(process: ForkProcess, out: IO[bytes], errors: IO[bytes]) -> Ended:
    process.join(60)
    process.kill()
    process.join()
    for stream in (out, errors):
        stream.seek(0)
    return Ended(process.exitcode or 0, out.read(), errors.read())


def at_step(number: int, of_rank: int, act: Callable[[], None]) -> Before:
    """In one process, once that step was made."""

    def before(rank: int) -> None:
        step = Recorder.step

        def made(recorder: Recorder, each: Any) -> None:
            step(recorder, each)
            if rank == of_rank and each.step == number:
                act()

        Recorder.step = made  # type: ignore[method-assign, assignment]

    return before
