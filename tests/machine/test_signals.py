"""Signals as processes, terminals and workers have them; each in a process of its own."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.paths import ROOT

HEARD = """
    import os, signal, sys, time
    from qft.machine.signals import Signals
    from qft.machine.streams import outlive_readers
    outlive_readers()
    signals = Signals()
"""


def start(code: str, **options: object) -> subprocess.Popen[str]:
    code = textwrap.dedent(HEARD) + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **options)  # type: ignore[call-overload]


def full() -> tuple[int]:
    """A file on a full disk."""
    return (os.open("/dev/full", os.O_WRONLY),)


def test_what_is_ignored_stays_ignored_and_the_rest_is_given_back() -> None:
    """As `nohup` starts a process."""
    code = """
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, before := lambda *_: None)
        with signals.caught():
            signals.waits = True
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.asked is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.asked == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) is before
    """
    with start(code) as process:
        assert process.wait() == 0


def test_a_forked_process_ends_by_what_it_is_sent() -> None:
    code = """
        read, write = os.pipe()
        with signals.caught():
            signals.waits = True
            if child := os.fork():
                os.read(read, 1)  # what comes before it runs, Python forgets
                os.kill(child, signal.SIGTERM)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
                assert signals.asked is None
            else:
                os.write(write, b"!")
                time.sleep(60)
    """
    with start(code) as process:
        assert process.wait() == 0


def test_a_terminal_that_hangs_up_does_not_end_the_step(tmp_path: Path) -> None:
    code = f"""
        with signals.caught():
            signals.waits = True
            print("ready", flush=True)
            while not signals.asked:
                time.sleep(0.01)
            print("to nobody", flush=True)
            print("nor this", file=sys.stderr, flush=True)
            open({str(tmp_path / "done")!r}, "w").write(signals.asked)
    """
    ours, theirs = pty.openpty()
    process = start(code, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    said = b""
    while not said.endswith(b"\n"):  # a terminal may hand over the word before its end
        said += os.read(ours, 100)
    assert said == b"ready\r\n"
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "done").read_text() == "SIGHUP"


@pytest.mark.parametrize(
    ("through", "why"),
    [("a terminal", "Input/output error"), ("a pipe", "Broken pipe"), ("a log", "No space left on device")],
)
def test_what_takes_no_more_ends_no_work(through: str, why: str, tmp_path: Path) -> None:
    """Before a signal has come, or without one."""
    code = f"""
        with signals.caught():
            sys.stdin.read()
            print("to nobody", flush=True)
            print("nor this", flush=True)
            print("to those who read errors", file=sys.stderr, flush=True)
        print("nor after it", flush=True)
        open({str(tmp_path / "done")!r}, "w")
    """
    made = {"a terminal": pty.openpty, "a pipe": os.pipe, "a log": full}[through]()
    process = start(code, stdin=subprocess.PIPE, stdout=made[-1], stderr=subprocess.PIPE, start_new_session=True)
    for number in made:
        os.close(number)
    _, errors = process.communicate("the other end is closed", timeout=60)
    told = f"nothing takes standard output any more ({why}); the work goes on"
    assert errors == f"\n{told}\nto those who read errors\n"
    assert process.returncode == 0
    assert (tmp_path / "done").exists()


def test_an_output_that_does_not_wait_is_waited_for() -> None:
    """Others have a terminal or pipe too, and may say so of it."""
    code = """
        os.set_blocking(1, False)
        sys.stdin.read()
        print("x" * 2**20)
    """
    process = start(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert len(process.communicate("", timeout=60)[0]) == 2**20 + 1
    assert process.returncode == 0


def test_a_worker_ends_by_its_parent_alone() -> None:
    code = """
        from qft.machine.signals import Deaf
        others = [signal.SIGINT, signal.SIGHUP]
        read, write = os.pipe()
        if child := os.fork():
            os.read(read, 1)
            for number in others:
                os.kill(child, number)
            if not (stranger := os.fork()):
                os.kill(child, signal.SIGTERM)
                os._exit(0)
            os.waitpid(stranger, 0)
            time.sleep(0.3)
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        else:
            Deaf(lambda _: os.write(write, b"!"))(0)
            time.sleep(60)
    """
    with start(code) as process:
        assert process.wait() == 0
