"""Allocators that fail, where and when a test says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

When = Callable[[int, bool], bool]
"""From the rows of a batch and whether the model trains, to whether memory runs out."""


def exhaust() -> None:
    """Ask the host for more than any has: torch's own failure."""
    torch.empty(1 << 60, dtype=torch.uint8)


@contextmanager
def exhausted(when: When, *, module: str = "LlamaMLP", phase: str = "forward") -> Iterator[None]:
    """In every module of that class, memory runs out as `when` says, in the forward or the backward pass."""

    def hook(each: Any, inputs: Any, output: Any) -> None:
        if type(each).__name__ != module or not when(len(inputs[0]), each.training):
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
