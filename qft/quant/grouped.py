"""Rows in the order of their experts times these experts' weights, some experts at a time: a GPU has a kernel for it.

Weights are dequantized for as many experts as AT_ONCE bytes hold in 16 bits, or for one that is larger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

AT_ONCE = 2**27
ALIGNED = 8
"""Numbers of 16 bits that the kernel reads at once: each row must have a multiple of them."""
KERNELS = {"cuda"}
"""Kinds of devices where the kernel is faster than a loop."""
Read = Callable[[int, int], torch.Tensor]
"""Weights [stop - start, in, out] of the experts from start to stop."""
Group = tuple[int, int, int]
"""Of rows that one expert multiplies: its number, the first row, and the one behind the last."""


class Chunk(NamedTuple):
    """Experts whose weights are there at once, and the rows that they multiply."""

    start: int
    stop: int
    first: int
    last: int


def is_able(x: torch.Tensor, sizes: Sequence[int]) -> bool:
    """Whether the kernel takes rows like these x, and matrices of these sizes. Tensors without contents stand for those
    on a GPU."""
    there = isinstance(x, FakeTensor) or x.device.type in KERNELS
    return there and x.dtype == torch.bfloat16 and all(size % ALIGNED == 0 for size in sizes)


def groups_of(ends: torch.Tensor, rows: int) -> Iterator[Group]:
    """Those that have rows, by where each expert's end. Without contents: as if one expert had its share, for what the
    others take has been given back by then."""
    experts = len(ends)
    if isinstance(ends, FakeTensor):
        yield 0, 0, -(-rows // experts)
        yield experts - 1, rows, rows
        return
    start = 0
    for number, end in enumerate(ends.tolist()):
        if end > start:
            yield number, start, end
        start = end


def chunks(ends: torch.Tensor, weights: int, rows: int) -> Iterator[Chunk]:
    """Yield those that have rows, `weights` to an expert. Where one holds all experts, the device is not waited for to
    learn how many rows each has. Without contents: the first alone, with its share of the rows."""
    experts = len(ends)
    count = min(max(AT_ONCE // (2 * weights), 1), experts)
    if isinstance(ends, FakeTensor) or (count == experts and rows >= experts):
        yield Chunk(0, count, 0, rows * count // experts)
        return
    groups = list(groups_of(ends, rows))
    for start in range(0, experts, count):
        own = [group for group in groups if start <= group[0] < start + count]
        if own:
            yield Chunk(start, min(start + count, experts), own[0][1], own[-1][2])


def times(x: torch.Tensor, width: int, read: Read, parts: Sequence[Chunk], ends: torch.Tensor) -> torch.Tensor:
    """Rows x [n, in] of all experts times their weights: [n, width]. `ends` [experts] are the rows where each expert's
    end; what is behind the last row means nothing."""
    if parts and parts[0].stop - parts[0].start == len(ends):
        return functional.grouped_mm(x, read(0, len(ends)), offs=ends)
    out = x.new_empty(len(x), width)
    for start, stop, first, last in parts:
        out[first:last] = functional.grouped_mm(x[first:last], read(start, stop), offs=ends[start:stop] - first)
    out[parts[-1].last if parts else 0 :] = 0
    return out


class Adapted:
    """Factors first [experts, in, r] and second [experts, r, out] that are multiplied beside, in 16 bits."""

    def __init__(self, first: Any, second: Any, scaling: float, ends: torch.Tensor, dtype: torch.dtype) -> None:
        self.first, self.second = first.to(dtype).contiguous(), second.to(dtype).contiguous()
        self.scaling, self.ends, self.kept = scaling, ends, first.dtype

    def add(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """scaling * (x first) second"""
        inner = functional.grouped_mm(x, self.first, offs=self.ends)
        out.add_(functional.grouped_mm(inner, self.second, offs=self.ends), alpha=self.scaling)

    def back(
        self, own: torch.Tensor | None, x: torch.Tensor, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds to the gradient of x, and returns those of the factors."""
        inner = functional.grouped_mm(gradient, self.second.mT, offs=self.ends).mul_(self.scaling)
        if own is not None:
            own.add_(functional.grouped_mm(inner, self.first.mT, offs=self.ends))
        outer = functional.grouped_mm(x, self.first, offs=self.ends).mul_(self.scaling)
        # Of an expert without rows nothing is written.
        unused = (torch.diff(self.ends, prepend=self.ends.new_zeros(1)) == 0)[:, None, None]
        return self._of_factors(x, inner, unused), self._of_factors(outer, gradient, unused)

    def _of_factors(self, rows: torch.Tensor, others: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
        return functional.grouped_mm(rows.mT, others, offs=self.ends).to(self.kept).masked_fill_(unused, 0)
