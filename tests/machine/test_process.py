"""Other programs: within a time limit, and gone with the one that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qft.machine import elsewhere
from qft.machine.process import Silent, started
from qft.quant.engines.llmcompressor import find_problem
from tests.support.paths import ROOT

FOREVER = "import time; time.sleep(600)"
FAMILY = (
    "import subprocess, sys, time\n"
    f"child = subprocess.Popen([sys.executable, '-c', {FOREVER!r}])\n"
    "print(child.pid, file=sys.stderr, flush=True)\n"
)


def is_running(pid: int) -> bool:
    """Whether the process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def gone(*pids: int) -> bool:
    """Whether they end, within half a minute."""
    deadline = time.monotonic() + 30
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_running, pids))


def program(path: Path, text: str) -> str:
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_what_it_has_started_ends_with_it() -> None:
    with started([sys.executable, "-c", FAMILY], silence=60) as watched:
        child = int(next(watched.lines()))
    assert watched.running.returncode == 0
    assert gone(watched.running.pid, child)


def test_an_exception_ends_it() -> None:
    pids: list[int] = []

    def interrupted() -> None:
        with started([sys.executable, "-c", FAMILY + FOREVER], silence=60) as watched:
            pids.extend([watched.running.pid, int(next(watched.lines()))])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert gone(*pids)


def test_silence_ends_it() -> None:
    with pytest.raises(Silent), started([sys.executable, "-c", FAMILY + FOREVER], silence=0.5) as watched:
        list(watched.lines())
    assert gone(watched.running.pid)
    assert watched.running.returncode == -signal.SIGKILL


def test_a_killed_parent_takes_it_along() -> None:
    code = (
        "import sys\nfrom qft.machine.process import started\n"
        f"with started([sys.executable, '-c', {FOREVER!r}], silence=600) as watched:\n"
        "    print(watched.running.pid, flush=True)\n    list(watched.lines())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_running(child)
        parent.kill()
    assert gone(child)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("import sys; sys.exit('no module')", "cannot import llmcompressor (no module)"),
        ("while True: print('y')", "is no Python that answers"),
        (FOREVER, "it gave no answer in 1 s"),
        ("print('version 0.1')", "has llmcompressor 0.1, which is too old"),
        ("print('version 9.0')", None),
    ],
)
def test_a_python_that_is_none(text: str, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "ASK_SECONDS", 1 if text == FOREVER else 20)
    found = find_problem(program(tmp_path / "python", text))
    assert found is None if problem is None else problem in str(found)
