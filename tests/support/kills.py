"""Commands that are killed: a fork of the test's process that has run everything once forks a child for each.

Of several threads a fork takes one along, so there are none here: torch computes with one.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from tests.support.forked import fork
from tests.support.paths import ROOT

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Its exit code, or -9 if it was killed."""
    seconds: float
    changes: int
    """Of files, that it made: renamed, removed, made, opened to be written."""
    place: str
    """Module of qft that it was in, if it was killed."""
    told: str
    """On both streams."""


@dataclass(frozen=True)
class Killer:
    """The process that forks, by its pipes."""

    asked: TextIO
    answers: TextIO

    def run(self, *arguments: Any, after: float | None = None, change: int | None = None) -> Ended:
        """Run `qft` in a fork, killed after so many seconds or before that change of a file, unless it ends first."""
        asked = {"arguments": [str(each) for each in arguments], "after": after, "change": change}
        self.asked.write(json.dumps(asked) + "\n")
        self.asked.flush()
        return Ended(**json.loads(self.answers.readline()))


@contextmanager
def killer(folder: Path, warm: list[list[str]]) -> Iterator[Killer]:
    """A process that has run the commands of `warm` itself; its files are in `folder`."""
    (its_in, our_out), (our_in, its_out) = os.pipe(), os.pipe()
    with (folder / "errors").open("w") as errors, open(our_out, "w") as asked, open(our_in) as answers:
        process = fork(lambda: _serve(folder, warm), stdin=its_in, stdout=its_out, stderr=errors)
        os.close(its_in)
        os.close(its_out)
        try:
            assert answers.readline() == "ready\n", (folder / "told").read_text()
            yield Killer(asked, answers)
        finally:
            process.kill()
            process.join()


def _serve(folder: Path, warm: list[list[str]]) -> None:
    torch.set_num_threads(1)
    answers, told = os.fdopen(os.dup(1), "w", buffering=1), folder / "told"
    _speak_into(told)
    from qft.views.html import chart

    chart._draw = lambda *_, **__: "<g/>"  # type: ignore[assignment]  # pictures take half a second
    for arguments in warm:
        if code := _command(arguments):
            raise SystemExit(f"{arguments} ended with {code}")
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGURG, signal.SIG_IGN)  # until a child has something to say to it
    answers.write("ready\n")
    for line in sys.stdin:
        answers.write(json.dumps(_forked(folder, **json.loads(line))) + "\n")


def _forked(folder: Path, arguments: list[str], after: float | None, change: int | None) -> dict[str, Any]:
    told, where, counted = (folder / name for name in ("told", "where", "counted"))
    for path in (where, counted):
        path.write_text("")
    started = time.monotonic()
    child = os.fork()
    if not child:
        _child(arguments, change, told, where, counted)
    status = None
    while status is None and (after is None or time.monotonic() - started < after):
        status = _status(child)
        time.sleep(0.0005)
    if status is None:
        os.kill(child, signal.SIGURG)  # it writes where it is
        until = time.monotonic() + 0.01
        while not where.stat().st_size and time.monotonic() < until:
            time.sleep(0.0002)
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {
        "code": status,
        "seconds": time.monotonic() - started,
        "changes": int(counted.read_text() or 0),
        "place": _place(where.read_text()),
        "told": told.read_text()[-2000:],
    }


def _status(child: int) -> int | None:
    ended, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _child(arguments: list[str], change: int | None, told: Path, where: Path, counted: Path) -> None:
    import faulthandler

    _speak_into(told)
    faulthandler.register(signal.SIGURG, file=where.open("w"), all_threads=False)
    made = 0

    def hear(event: str, about: tuple[Any, ...]) -> None:
        nonlocal made
        opened = event == "open" and isinstance(about[2], int) and about[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or opened:
            made += 1
            if made == change:
                os.write(marks, "".join(traceback.format_stack()[::-1]).encode())
                os.kill(os.getpid(), signal.SIGKILL)

    marks = os.open(where, os.O_WRONLY)
    sys.addaudithook(hear)
    code = _command(arguments)
    counted.write_text(str(made))
    os._exit(code)


def _speak_into(path: Path) -> None:
    """Both streams, of which a kill takes nothing that was said before."""
    stream = path.open("w", buffering=1)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(stream.fileno(), number)
        setattr(sys, name, stream)


def _command(arguments: list[str]) -> int:
    from qft.cli import app

    sys.argv = ["qft", *arguments]
    try:
        app(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _place(stack: str) -> str:
    """The innermost module of qft that a stack, innermost first, names."""
    lines = (line.partition(f'"{ROOT}/qft/')[2].partition('"')[0] for line in stack.splitlines())
    return next((line.removesuffix(".py") for line in lines if line), "elsewhere")
