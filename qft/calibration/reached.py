"""Which experts of a mixture the calibration windows reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

SHOWN = 8
"""Experts that are named."""


@contextmanager
def watch_experts(module: nn.Module, experts: Mapping[str, int]) -> Iterator[Callable[[], list[str]]]:
    """While entered, note what the experts in `module` are given; `experts` are their modules, by names in it, and how
    many each has. Yields a function that tells, for each module, those that were given no token. Nothing is told of
    modules that are not given the numbers of experts: what computes all of them for every token."""
    seen: dict[str, torch.Tensor] = {}

    def note(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.ndim == 2 and not value.is_floating_point():
                counts = torch.bincount(value.flatten(), minlength=experts[name])[: experts[name]].cpu()
                seen[name] = seen.get(name, 0) + counts

    hooks = [
        module.get_submodule(name).register_forward_pre_hook(partial(note, name), with_kwargs=True) for name in experts
    ]
    try:
        yield lambda: [told for name, counts in seen.items() for told in _told(name, counts)]
    finally:
        for hook in hooks:
            hook.remove()


def _told(name: str, counts: torch.Tensor) -> Iterator[str]:
    missed = [str(number) for number, count in enumerate(counts.tolist()) if not count]
    if missed:
        more = f" and {len(missed) - SHOWN} more" if len(missed) > SHOWN else ""
        yield f"{name}: no window reaches experts {', '.join(missed[:SHOWN])}{more} (of {len(counts)})"
