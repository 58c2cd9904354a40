"""Memory as measured on a CUDA device."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qft.commands.train import train
from qft.documents.training import read_report
from qft.progress import Step, View
from qft.recipe import load

pytestmark = pytest.mark.gpu

RecipeFile = Callable[..., Path]
MIB = 2**20


class Keeper(View):
    def __init__(self, count: int) -> None:
        self.count = count
        self.kept: list[torch.Tensor] = []

    def step(self, step: Step) -> None:
        if self.count:
            self.kept.append(torch.ones(self.count, dtype=torch.uint8, device="cuda"))


def test_each_phase_has_its_peak_on_the_gpu(recipe_file: RecipeFile, chat_file: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    settings = {"gradient_accumulation_steps": 1, "report_to": []}
    memory = train(
        load(recipe_file(model={"device": "cuda"}, train=settings, data={"eval": str(chat_file)})), View()
    ).memory
    names = ["prepare", "load", "adapters", "evaluate_before", "train", "save", "evaluate_after"]
    assert list(memory.phases) == names
    for phase in memory.phases.values():
        assert phase.gpu_allocated_bytes is not None
        assert phase.gpu_reserved_bytes is not None
        assert phase.gpu_fragmentation_bytes == phase.gpu_reserved_bytes - phase.gpu_allocated_bytes >= 0
        assert phase.gpu_inactive_split_bytes is not None
    peaks = [phase.gpu_allocated_bytes or 0 for phase in memory.phases.values()]
    assert max(peaks) == memory.peak_gpu_bytes
    moments = [moment.gpu_allocated_bytes or 0 for moment in memory.moments.values()]
    assert moments[0] < moments[1] < moments[2] < moments[3]
    parts = memory.components
    assert parts.undivided is None
    assert parts.activations is not None
    held = parts.base_weights + parts.trainable_weights + parts.gradients + parts.optimizer_state
    assert held + parts.activations == memory.phases["train"].gpu_allocated_bytes
    assert memory.leak is None


def test_a_leak_on_the_gpu_is_found(recipe_file: RecipeFile) -> None:
    # A checkpoint waits for what was done, so that the view would be told of no step, and then of two.
    settings = {"max_steps": 24, "report_to": [], "save_strategy": "no"}
    memory = train(load(recipe_file(model={"device": "cuda"}, train=settings)), Keeper(MIB)).memory
    assert memory.leak is not None
    assert memory.leak.suspect == "growing list"
    assert "kept of Keeper" in memory.leak.evidence
    assert memory.leak.bytes_per_100_steps == pytest.approx(100 * MIB, rel=0.02)
    assert memory.growth_bytes_per_100_steps == pytest.approx(100 * MIB, rel=0.02)


def test_segments_expand_and_the_report_says_so(recipe_file: RecipeFile, tmp_path: Path) -> None:
    code = "import sys; from qft.cli import main; sys.argv[0] = 'qft'\ntry:\n main()\nexcept SystemExit: pass\n"
    code += "import torch; print(any(s.get('is_expandable') for s in torch.cuda.memory_snapshot()), file=sys.stderr)"
    path = recipe_file(model={"device": "cuda"})
    command = [sys.executable, "-c", code, "train", str(path), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert read_report(tmp_path / "run").memory.gpu_allocator == "PYTORCH_ALLOC_CONF=expandable_segments:True"
    assert done.stderr.strip().splitlines()[-1] == "True"
