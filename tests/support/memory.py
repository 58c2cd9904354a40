"""Allocators that fail, where and when a test says, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from qft.documents.training import Report
from tests.support.runs import adapter

When = Callable[[int, bool], bool]
"""From the rows of a batch and whether the model trains, to whether memory runs out."""

Change = tuple[int, str, str, int | bool | str, int]
"""Step, phase, field, its value from there on, and the passes in a step."""


def exhaust() -> None:
    """Ask the host for more than any has: torch's own failure."""
    torch.empty(1 << 60, dtype=torch.uint8)


@contextmanager
def exhausted(when: When, *, module: str = "LlamaMLP", phase: str = "forward") -> Iterator[None]:
    """In every module of that class, memory runs out as `when` says, in the forward or the backward pass."""

    def hook(each: Any, inputs: Any, output: Any) -> None:
        predicting = _get_current_dispatch_mode() is not None
        if predicting or type(each).__name__ != module or not when(len(inputs[0]), each.training):
            return
        if phase == "forward":
            exhaust()
        elif output.requires_grad:
            output.register_hook(lambda gradient: exhaust())

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def above(rows: int) -> When:
    """While it trains, on more rows than those."""
    return lambda given, trains: trains and given > rows


def times(*calls: int) -> When:
    """In those of the passes of training, counted from 1."""
    seen = [0]

    def when(rows: int, trains: bool) -> bool:
        seen[0] += trains
        return trains and seen[0] in calls

    return when


@contextmanager
def optimizer_fails(*calls: int, after: bool = False) -> Iterator[None]:
    """Memory runs out in those steps of the optimizer, counted from 1: before it has done anything, or when it has
    changed everything."""
    made = [0]

    def hook(*_: Any) -> None:
        made[0] += 1
        if made[0] in calls:
            exhaust()

    handle = (register_optimizer_step_post_hook if after else register_optimizer_step_pre_hook)(hook)
    try:
        yield
    finally:
        handle.remove()


def changes(report: Report) -> list[Change]:
    return [(e.step, e.phase, e.field, e.now, e.gradient_accumulation_steps) for e in report.out_of_memory]


def weights(report: Report) -> dict[str, torch.Tensor]:
    whole = Path(report.run) / "model" / "model.safetensors"
    return load_file(whole) if whole.exists() else adapter(Path(report.run))


def assert_equal(one: Report, other: Report) -> None:
    """The same rows in the same steps, and what was learnt of them, but for float error."""
    for mine, others in zip(one.loss.history, other.loss.history, strict=True):
        assert mine == pytest.approx(others, rel=1e-5)
    for name in ("steps", "samples", "tokens", "supervised_tokens", "skipped_steps"):
        assert getattr(one, name) == getattr(other, name), name
    learnt = weights(one)
    for name, tensor in weights(other).items():
        torch.testing.assert_close(learnt[name], tensor, rtol=1e-4, atol=1e-5)
