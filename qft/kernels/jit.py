"""Triton where it is installed, as it is with torch for a GPU; its kernels are defined without it all the same."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

_LARGEST = 2**31 - 1
"""Of whole numbers that a kernel takes in 32 bits."""
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


_COMPILED: dict[Any, tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = {}
"""What launches a kernel, the compiled kernel, and its constants, by all that it was compiled for."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Run a kernel on tensors, whole numbers, floats, and None where it does not look; its constants are among the
    settings. On tensors without contents there is nothing to run.

    Triton asks each argument anew what a kernel is to be compiled for, which takes the host twice as long as the launch
    itself. So what it compiled is kept here, by what tells apart at least what Triton does."""
    first = arguments[0]
    if isinstance(first, FakeTensor):
        return
    if not first.is_cuda or torch.version.hip is not None or _is_watched():
        kernel[grid](*arguments, **settings)
        return
    key, values = _specialized(arguments)
    known = (kernel.fn, device := first.get_device(), *settings.values(), *key)
    if (found := _COMPILED.get(known)) is None:
        compiled = kernel[grid](*arguments, **settings)
        constants = tuple(settings[name] for name in kernel.arg_names[len(arguments) :])
        _COMPILED[known] = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None), constants
    else:
        run, made, constants = found
        width, height = grid if len(grid) == 2 else (*grid, 1)
        run(width, height, 1, _runtime().driver.active.get_current_stream(device), *made, *values, *constants)


def _specialized(arguments: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """What a kernel is compiled for: dtypes, addresses by their last bits, and of whole numbers whether they are 1, a
    multiple of 16 or too large for 32 bits; and the arguments, with addresses for tensors."""
    key: list[Any] = []
    values: list[Any] = []
    for argument in arguments:
        kind = type(argument)
        if kind is int:
            key.append((argument & 15 and 2) + (argument == 1) + 4 * (argument > _LARGEST))
            values.append(argument)
        elif kind is float or argument is None:
            key.append(kind)
            values.append(argument)
        else:
            place = argument.data_ptr()
            key += (argument.dtype, place & 15)
            values.append(place)
    return key, values


@cache
def _runtime() -> Any:
    return importlib.import_module("triton.runtime")


@cache
def _knobs() -> Any:
    return importlib.import_module("triton.knobs").runtime


def _is_watched() -> bool:
    """Whether somebody, as a profiler, asked Triton to be told of each launch."""
    hooks = (_knobs().launch_enter_hook, _knobs().launch_exit_hook)
    return any(getattr(hook, "calls", hook) for hook in hooks)


def ceil_div(count: int, size: int) -> int:
    return -(-count // size)


def power_of_2(count: int) -> int:
    """The smallest that is no less."""
    return 1 << max(count - 1, 0).bit_length()
