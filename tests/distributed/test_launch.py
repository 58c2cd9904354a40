"""Processes are started by torch's elastic launcher, and started again if that is asked."""

from __future__ import annotations

import sys
from pathlib import Path

from qft.distributed.launch import launch

CODE = """
import os, pathlib, signal, sys
rank, again = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
pathlib.Path(sys.argv[1], f"{rank}-{again}").touch()
if rank == "1" and again == "0":
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2] == "kill" else sys.exit(int(sys.argv[2]))
"""


def run(folder: Path, how: str, restarts: int) -> tuple[tuple[int, int], set[str]]:
    ended = launch([sys.executable, "-S", "-c", CODE, str(folder), how], 2, restarts)
    return ended, {path.name for path in folder.iterdir()}


def test_max_restarts_starts_all_again(tmp_path: Path) -> None:
    assert run(tmp_path, "kill", 1) == ((0, 0), {"0-0", "1-0", "0-1", "1-1"})


def test_what_failed_first_is_told(tmp_path: Path) -> None:
    assert run(tmp_path, "kill", 0) == ((1, -9), {"0-0", "1-0"})
    assert run(tmp_path, "8", 0)[0] == (1, 8)
