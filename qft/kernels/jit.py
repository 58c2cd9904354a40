"""Triton where it is installed, as it is with torch for a GPU; its kernels are defined without it all the same."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
tl: Any = importlib.import_module("triton.language") if HAS_TRITON else SimpleNamespace(constexpr=int)


def jit(kernel: Any) -> Any:
    """triton.jit; without Triton the function, which nobody may call then."""
    return importlib.import_module("triton").jit(kernel) if HAS_TRITON else kernel


def by_triton(x: torch.Tensor) -> bool:
    """Whether kernels take this tensor: on a GPU, or on a CPU where Triton interprets them (TRITON_INTERPRET=1). One
    without contents stands for one on a GPU."""
    if isinstance(x, FakeTensor):
        return True
    return HAS_TRITON and (x.is_cuda or (x.is_cpu and os.environ.get("TRITON_INTERPRET") == "1"))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Run a kernel; on tensors without contents there is nothing to run."""
    if not isinstance(arguments[0], FakeTensor):
        kernel[grid](*arguments, **settings)


def ceil_div(count: int, size: int) -> int:
    return -(-count // size)


def power_of_2(count: int) -> int:
    """The smallest that is no less."""
    return 1 << max(count - 1, 0).bit_length()
