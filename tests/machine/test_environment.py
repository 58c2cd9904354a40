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
    if command == "check":
        assert told(OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"


def test_segments_of_the_gpu_expand_where_nobody_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidiactl").touch()
    for name in environment.ALLOCATOR:
        monkeypatch.setenv(name, "")  # so that it is as before behind the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(environment, "GPUS", (str(tmp_path / "nvidiactl"),))
    environment.prepare_libraries()
    assert environment.allocator_settings() == "PYTORCH_ALLOC_CONF=expandable_segments:True"
    for name in environment.ALLOCATOR:
        monkeypatch.delenv("PYTORCH_ALLOC_CONF")
        monkeypatch.setenv(name, "max_split_size_mb:128")
        environment.prepare_libraries()
        assert environment.allocator_settings() == f"{name}=max_split_size_mb:128"
        monkeypatch.delenv(name)
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setattr(environment, "GPUS", (str(tmp_path / "none"),))
    environment.prepare_libraries()
    assert environment.allocator_settings() == "torch's defaults"


def test_a_machine_with_a_gpu_keeps_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    for path, policy in [(tmp_path / "none", "PASSIVE"), (tmp_path, None)]:
        monkeypatch.delenv("OMP_WAIT_POLICY")
        monkeypatch.setattr(environment, "GPUS", ("no NVIDIA", str(path)))
        environment.prepare_libraries()
        assert os.environ.get("OMP_WAIT_POLICY") == policy
        monkeypatch.setenv("OMP_WAIT_POLICY", "")
