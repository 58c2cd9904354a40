"""What an allocator would hold while tensors without contents are computed with: each storage, born and freed."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GRANULE = 512
"""Bytes that CUDA's caching allocator rounds each block up to (c10/cuda/CUDACachingAllocator.cpp)."""


PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}


def in_granules(size: int) -> int:
    """Bytes that an allocator takes for so many."""
    return -(-size // GRANULE) * GRANULE


def _work(args: Sequence[Any]) -> int:
    """Of one product of the last two matrices."""
    one, other = [each for each in args if isinstance(each, torch.Tensor)][-2:]
    return one.numel() * other.shape[-1]


@dataclass(frozen=True)
class Peak:
    """Bytes at the worst moment of a part of the work, in all and by what they are."""

    total: int
    parts: Mapping[str, int]

    def extrapolated(self, longer: Peak, times: int) -> Peak:
        """What it comes to when what lies between this and the `longer` is added `times` more to that."""
        names = {*self.parts, *longer.parts}
        parts = {n: longer.parts.get(n, 0) + times * (longer.parts.get(n, 0) - self.parts.get(n, 0)) for n in names}
        return Peak(longer.total + times * (longer.total - self.total), parts)

    def with_more(self, label: str, size: int) -> Peak:
        """With so many bytes beside it."""
        return Peak(self.total + size, {**self.parts, label: self.parts.get(label, 0) + size}) if size else self


@dataclass
class _Block:
    label: str
    size: int


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the storages of all tensors that are made while it is entered, and when nobody holds them any more.

    `label` says what those made now are for, `part` which part of the work is under way."""

    def __init__(self, label_of: Callable[[torch.Tensor, str], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.label = self.part = ""
        self.work: Counter[str] = Counter()
        """By part, multiplications with additions of all products of matrices."""
        self._label_of = label_of
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._block_of: dict[int, _Block] = {}
        self._events: list[tuple[str, int, _Block]] = []
        """Part, 1 or -1, and what was born or freed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in PRODUCTS:
            self.count(_work(args))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor)
        return made

    def count(self, work: float) -> None:
        """Add to the work of the part that is under way."""
        self.work[self.part] += round(work)

    def note(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        block = _Block(self._label_of(tensor, self.label), in_granules(storage.nbytes()))
        self._block_of[key] = block
        self._events.append((self.part, 1, block))
        self._alive[key] = weakref.ref(storage, lambda _: self._free(key))

    def relabel(self, tensor: torch.Tensor, label: str) -> None:
        """Say what a tensor that was made turned out to be."""
        self._block_of[tensor.untyped_storage()._cdata].label = label

    def forget(self, tensor: torch.Tensor) -> int:
        """Count a tensor no more: it is elsewhere. Returns its bytes."""
        block = self._block_of[tensor.untyped_storage()._cdata]
        size, block.size = block.size, 0
        return size

    def _free(self, key: int) -> None:
        del self._alive[key]
        self._events.append((self.part, -1, self._block_of.pop(key)))

    def peaks(self) -> dict[str, Peak]:
        """The worst moment of each part."""
        now: Counter[str] = Counter()
        total, found = 0, dict[str, Peak]()
        for part, sign, block in self._events:
            now[block.label] += sign * block.size
            total += sign * block.size
            if part not in found or total > found[part].total:
                found[part] = Peak(total, dict(now))
        return found
