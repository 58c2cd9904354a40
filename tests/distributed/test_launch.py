"""Processes are started by torch's elastic launcher, and started again if that is asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from qft.distributed.launch import launch
from qft.errors import Interrupted
from tests.support.forked import fork
from tests.support.paths import ROOT

CODE = """
import os, pathlib, signal, sys
rank, again = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
pathlib.Path(sys.argv[1], f"{rank}-{again}").touch()
if rank == "1" and again == "0":
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2] == "kill" else sys.exit(int(sys.argv[2]))
"""


def run(folder: Path, how: str, restarts: int) -> tuple[tuple[int, int], set[str]]:
    # In a thread, whose stack is short: torch walks through all of it, again and again.
    with ThreadPoolExecutor() as pool:
        ended = pool.submit(launch, [sys.executable, "-S", "-c", CODE, str(folder), how], 2, restarts).result()
    return ended, {path.name for path in folder.iterdir()}


def test_max_restarts_starts_all_again(tmp_path: Path) -> None:
    assert run(tmp_path, "kill", 1) == ((0, 0), {"0-0", "1-0", "0-1", "1-1"})


def test_what_failed_first_is_told(tmp_path: Path) -> None:
    assert run(tmp_path, "kill", 0) == ((1, -9), {"0-0", "1-0"})
    assert run(tmp_path, "8", 0)[0] == (1, 8)


WAITS = """
import os, pathlib, signal, sys
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
signal.signal(signal.SIGUSR1, lambda *_: sys.exit((folder / f"{rank} heard").touch()))
(folder / f"{rank} waits").touch()
signal.pause()
"""


def test_all_hear_what_the_launcher_hears_and_nothing_that_it_was_started_to_ignore(tmp_path: Path) -> None:
    def work() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            launch([sys.executable, "-S", "-c", WAITS, str(tmp_path)], 2, 0)
        except Interrupted as interrupted:
            sys.exit(interrupted.exit_code)

    with Path(os.devnull).open("r+") as nothing:
        process = fork(work, stdin=nothing, stdout=nothing, stderr=2)
    while not all((tmp_path / f"{rank} waits").exists() for rank in range(2)):
        assert process.is_alive()
        time.sleep(0.02)
    assert process.pid
    for number in (signal.SIGHUP, signal.SIGUSR1):
        os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGUSR1
    assert all((tmp_path / f"{rank} heard").exists() for rank in range(2))


CLUSTER = ROOT / "recipes" / "cluster"
TASK = {"name", "workdir", "num_nodes", "resources", "file_mounts", "setup", "run", "envs", "secrets"}
"""Of a SkyPilot task, by sky/utils/schemas.py."""


def test_cluster_templates_are_read_by_their_languages() -> None:
    slurm = CLUSTER / "slurm.sh"
    assert subprocess.run(["bash", "-n", slurm], check=False).returncode == 0
    head = [line for line in slurm.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert {line.split()[1].partition("=")[0] for line in head} >= {"--requeue", "--signal", "--ntasks-per-node"}
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert task.keys() <= TASK
    assert task["resources"]["job_recovery"] == {
        "recover_on_exit_codes": [Interrupted("SIGTERM", resumable=True).exit_code]
    }
    assert subprocess.run(["bash", "-n", "-c", task["run"]], check=False).returncode == 0
    compile((CLUSTER / "ray_train.py").read_text(), "ray_train.py", "exec")
