"""By how much a training makes a process grow in which nothing else ever ran.

What a process has freed before is used again without growing, and what it still has to free makes it shrink: so not one
of those that run the tests.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import patch

from qft.commands.train import train
from qft.progress import View
from qft.recipe import load
from tests.support.forked import ended

ROOT = Path(__file__).resolve().parents[2]
MMAP_THRESHOLD = -3
"""Of mallopt: M_MMAP_THRESHOLD."""


def growth(*recipes: Path) -> list[int]:
    """Bytes of its own memory at the most, not of files, that each of these trainings takes. Reads /proc."""
    command = [sys.executable, "-m", __name__, *map(str, recipes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.splitlines()]


def anonymous() -> int:
    """Bytes of this process's own memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def tell_growth(recipe: Path) -> None:
    """By how much a training makes this process grow at its largest."""
    library = ctypes.CDLL(None)
    library.mallopt(MMAP_THRESHOLD, 2**20)
    library.malloc_trim(0)
    over, before = threading.Event(), anonymous()
    peak = [before]

    def look() -> None:
        while not over.wait(0.005):
            peak.append(anonymous())

    thread = threading.Thread(target=look)
    thread.start()
    with patch("qft.views.html.chart._draw", lambda *_, **__: "<g/>"):  # as in all tests
        train(load(recipe), View())
    over.set()
    thread.join()
    sys.stdout.write(f"{max(peak) - before}\n")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        done = ended(functools.partial(tell_growth, Path(name)))
        assert done.returncode == 0, done.stderr.decode()
        sys.stdout.write(done.stdout.decode())
