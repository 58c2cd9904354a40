"""What the libraries find in their environment when they are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qft.machine import environment
from tests.support.paths import ROOT

WHEN_TORCH_IS_LOOKED_FOR = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
from qft.cli import main
main()
"""


@pytest.mark.parametrize("command", ["check", "train", "calibrate", "eval", "export", "chat"])
def test_threads_are_told_to_sleep_before_torch_is_loaded(command: str, recipe_file: Callable[..., Path]) -> None:
    def told(**own: str) -> str:
        inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        arguments = [sys.executable, "-c", WHEN_TORCH_IS_LOOKED_FOR, command, str(recipe_file())]
        variables = inherited | {"PYTHONPATH": str(ROOT)} | own
        return subprocess.run(arguments, env=variables, capture_output=True, text=True, check=True).stdout.strip()

    has_gpu = any(Path(path).exists() for path in environment.GPUS)
    assert told() == ("None" if has_gpu else "PASSIVE")
    assert told(OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"


def test_a_machine_with_a_gpu_keeps_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    for path, policy in [(tmp_path / "none", "PASSIVE"), (tmp_path, None)]:
        monkeypatch.delenv("OMP_WAIT_POLICY")
        monkeypatch.setattr(environment, "GPUS", (str(path),))
        environment.prepare_libraries()
        assert os.environ.get("OMP_WAIT_POLICY") == policy
        monkeypatch.setenv("OMP_WAIT_POLICY", "")
