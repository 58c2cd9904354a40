"""Processes are started by torch's elastic launcher, and started again if that is asked."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from qft.distributed.launch import launch
from qft.errors import Interrupted
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
