"""Fifty steps with kernels lie within what the plain path's own seeds differ by; and a GPU that is not waited for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qft.documents.training import Report
from tests.support.gguf import saved
from tests.support.models import tiny_llama
from tests.support.runs import adapter, run

pytestmark = pytest.mark.gpu
STEPS = 50


def curve(report: Report) -> torch.Tensor:
    """Losses as means of ten steps each."""
    return torch.tensor([loss for _, loss, *_ in report.loss.history]).view(-1, 10).mean(1)


def test_curves_lie_within_the_spread_of_seeds(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    base = saved(tiny_llama(hidden_size=256, intermediate_size=512), tmp_path / "base")
    train: dict[str, Any] = {
        "max_steps": STEPS,
        "learning_rate": 3e-3,
        "report_to": [],
        "lr_scheduler_type": "constant",
    }
    train |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}

    def learnt(name: str, seed: int, **more: Any) -> torch.Tensor:
        path = recipe_file(
            model={"path": str(base), "device": "cuda"}, train=train | more, seed=seed, output_dir=str(tmp_path / name)
        )
        return curve(run(path))

    plain = torch.stack([learnt(f"plain-{seed}", seed, kernels="plain") for seed in (0, 1, 2)])
    spread = (plain.amax(0) - plain.amin(0)).max()
    again: dict[str, Any] = {"gradient_checkpointing": 2**20}
    for name, more in (("fused", {"kernels": "fused"}), ("less", {"kernels": "fused"} | again)):
        assert (learnt(name, 0, **more) - plain[0]).abs().max() <= spread, name
    assert plain[0][-1] < plain[0][0] - spread  # it learns more than seeds differ by


def test_a_gpu_leaves_out_updates_that_are_not_finite(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"learning_rate": 1e30, "warmup_steps": 0.0, "max_grad_norm": 0.0, "weight_decay": 0.1}
    settings |= {"on_nonfinite": "skip", "optim": "adamw_torch_fused", "report_to": []}
    found = []
    for steps in (1, 4):
        path = recipe_file(model={"device": "cuda"}, train=settings | {"max_steps": steps})
        report = run(path, overwrite=True)
        found.append(adapter(tmp_path / "run"))
        assert report.skipped_steps == steps - 1
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())
