"""Memory with a border: columns behind those of a matrix, so that a product takes what stands there along.

A tensor with a border is a view [rows, columns] of [rows, columns + border] whose storage is marked as made here: what
lies behind the columns of anybody else's tensor is not ours to write.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def bordered_empty(shape: Sequence[int], border: int, like: torch.Tensor) -> torch.Tensor:
    """[..., columns] without contents, with a border; autograd sees no view of anything."""
    *outer, columns = shape
    whole = torch.empty(math.prod(outer), columns + border, dtype=like.dtype, device=like.device)
    storage: Any = whole.untyped_storage()
    storage.qft_border = border
    return whole.view(*outer, columns + border)[..., :columns].data


def with_border(x: torch.Tensor, border: int, columns: int | None = None) -> torch.Tensor | None:
    """The whole [rows, columns + border] of a view with such a border of all its columns, or the first of `columns`;
    None: it has none. What is written there is seen by no version counter."""
    columns = columns or x.shape[-1]
    if getattr(x.untyped_storage(), "qft_border", None) != border or x.stride() != (columns + border, 1):
        return None
    if x.storage_offset() or x.untyped_storage().nbytes() != len(x) * (columns + border) * x.element_size():
        return None
    return x.detach().as_strided((len(x), columns + border), (columns + border, 1)).data


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """[..., columns] as [rows, columns], with rows one behind the other at any distance."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


class Scratch:
    """Two places on each device that weights are dequantized into, one matrix after the other: the largest matrices
    into one, all others into the other. What lies there is nobody's once the next comes."""

    def __init__(self) -> None:
        self._largest = 0
        self._places: dict[Any, torch.Tensor] = {}
        self._writers: dict[Any, tuple[int, int]] = {}
        """Who wrote last, and in which backward pass; -1: in none."""

    def expect(self, rows: int, columns: int) -> None:
        """Say that matrices of this size will come."""
        self._largest = max(self._largest, rows * columns)

    def matrix(
        self, rows: int, columns: int, device: torch.device, dtype: torch.dtype, owner: object
    ) -> tuple[torch.Tensor, bool]:
        """[rows, columns], and whether it holds what `owner` wrote there within the same backward pass: of a block that
        is computed again, the last matrix is one that its gradients need. Else it is of any contents."""
        size = rows * columns
        key = (device, dtype, size >= self._largest)
        place = self._places.get(key)
        if place is None or place.numel() < size:
            self._places.pop(key, None)
            place = self._places[key] = torch.empty(size, dtype=dtype, device=device)
        now = (id(owner), torch._C._current_graph_task_id())
        held, self._writers[key] = self._writers.get(key), now
        return place[:size].view(rows, columns), held == now and now[1] != -1

    def clear(self) -> None:
        """Give the memory back, and expect nothing."""
        self._places.clear()
        self._writers.clear()
        self._largest = 0

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Other places meanwhile."""
        before = self._places, self._writers, self._largest
        self._places, self._writers, self._largest = {}, {}, 0
        try:
            yield
        finally:
            self._places, self._writers, self._largest = before


SCRATCH = Scratch()


def border_for(columns: int, multiple: int = 64) -> int:
    """Columns of a border that has room for so many, a whole number of what tensor cores take at once."""
    return math.ceil(columns / multiple) * multiple
