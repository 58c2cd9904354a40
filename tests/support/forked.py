"""`qft` as a process of its own that is forked from this one, in which all that takes seconds to import is imported."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch

from qft.cli import main


def fork(work: Callable[[], object], *, stdin: Any, stdout: Any, stderr: Any, **environment: str) -> ForkProcess:
    """Start `work` with these streams, which have a fileno, in a session of its own, where a signal does what it does
    to a program."""
    files = [stream if isinstance(stream, int) else stream.fileno() for stream in (stdin, stdout, stderr)]

    def run() -> None:
        os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.environ.update(environment)
        encoding = environment.get("PYTHONIOENCODING", "utf-8")
        sys.stdin = open(0, encoding=encoding, closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN if number == signal.SIGPIPE else signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)  # those that the parent's would be waited for are not in this process
        work()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def command(*arguments: Any) -> Callable[[], None]:
    """`qft` with these arguments."""

    def work() -> None:
        sys.argv = ["qft", *map(str, arguments)]
        main()

    return work


@dataclass
class Ended:
    returncode: int
    stdout: bytes
    stderr: bytes


def ended(work: Callable[[], object], stdout: Any = None, **environment: str) -> Ended:
    """What became of it, and what it wrote: where it wrote to `stdout`, that is empty."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors, Path(os.devnull).open() as nothing:
        process = fork(work, stdin=nothing, stdout=out if stdout is None else stdout, stderr=errors, **environment)
        process.join(120)
        process.kill()
        process.join()
        assert process.exitcode is not None
        out.seek(0)
        errors.seek(0)
        return Ended(process.exitcode, out.read(), errors.read())
