"""Whether memory grows from step to step, and what with it: a retained graph, a list, a cache."""

from __future__ import annotations

import ctypes
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from qft.documents.memory import Leak, Suspect
from qft.memory.census import Census, grown_containers, grown_types, holder, steady, take_census
from qft.memory.meter import Snapshot

BLOCKS = 6
"""Into which the steps are divided to tell growth from a jump."""
FEWEST_STEPS = 8
"""Of a run in which a suspect can be named."""
WARM = 2
"""Steps that also allocate what stays."""
MALLINFO = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
SMALL = 64
"""Bytes that an object of Python's own allocator is taken to have, of 16 to 512: C's does not tell of them."""
GARBAGE = 2**20
"""Of such objects, what may only wait to be collected."""
NODE_BYTES = 512
"""Of a node of an autograd graph, at the least, beside the tensors that it keeps."""


class LeakWatch:
    """Notes the memory after each step. The objects are counted only once memory has grown: then, half as many steps
    later, and at the end."""

    def __init__(self, threshold: int | None) -> None:
        """`threshold`: bytes per 100 steps from which growth is a leak; None: no leak is looked for."""
        self.threshold = threshold
        self.device: list[int] = []
        """Bytes after each step, of the device that trains."""
        self.host: list[int] = []
        self._warm = (0, 0, 0)
        self._looks: list[Census] = []

    def look(self, now: Snapshot) -> None:
        """Note a step's end."""
        self.device.append(now.device)
        self.host.append(now.host)
        step = len(self.device)
        if self.threshold is None:
            return
        if len(self._looks) == 1 and 2 * step == 3 * self._looks[0].step:
            self._looks.append(take_census(step))
        elif not self._looks and not step & (step - 1):
            held = (now.gpu, heap_in_use() or now.host, sys.getallocatedblocks() * SMALL)
            if step <= WARM:
                self._warm = (*held[:2], held[2] + GARBAGE)
            elif max(b - a for a, b in zip(self._warm, held, strict=True)) * 100 >= self.threshold * (step - WARM):
                self._looks.append(take_census(step))

    def leak(self, on_gpu: bool) -> Leak | None:
        """What grew beyond the threshold, looked for now."""
        if self.threshold is None:
            return None
        growth, step = growth_per_100_steps(self.device) or 0, len(self.device)
        looks, self._looks = self._looks, []
        found: Iterable[_Grown] = ()
        if len(looks) == 2 and step >= looks[1].step + 2:
            found = _suspects([*looks, take_census(step)], growth)
        most = max(found, key=lambda each: each.rank, default=None)
        if most and most.bytes >= self.threshold:
            return Leak(suspect=most.suspect, bytes_per_100_steps=most.bytes, evidence=most.evidence)
        # What an allocator on the host keeps, or kernels for shapes that come late, grow too; a GPU's count is exact.
        if on_gpu and growth >= self.threshold:
            words = "no Python object was found that grew with it"
            return Leak(suspect="unknown", bytes_per_100_steps=growth, evidence=words)
        return None


class _Grown(NamedTuple):
    suspect: Suspect
    bytes: int
    """Per 100 steps."""
    evidence: str

    @property
    def rank(self) -> int:
        """A list, or a cache, says more than what is in it."""
        return self.bytes * (2 if self.suspect in ("growing list", "growing cache") else 1)


def _suspects(looks: Sequence[Census], growth: int) -> Iterator[_Grown]:
    """Yield what grew by one a step or more. `growth` is that of the device, in bytes per 100 steps."""
    kinds = {kind: steady(looks, [look.tensors[kind] for look in looks]) for kind in looks[-1].tensors}
    kinds = {kind: rate for kind, rate in kinds.items() if rate >= 1}
    containers = list(grown_containers(looks))
    if (nodes := steady(looks, [look.graph_nodes for look in looks])) >= 1:
        found = max(growth, round(100 * (nodes * NODE_BYTES + sum(rate * size for (_, size), rate in kinds.items()))))
        where = next((f", in {_place(container)}" for container, *_ in containers if _holds_graph(container)), "")
        told = (
            f"{looks[-1].graph_tensors:,} tensors{where} hold the graphs they came from, {nodes:,.1f} nodes more a step"
        )
        yield _Grown("retained graph", found, f"{told}: keep loss.detach() or loss.item(), not the loss")
        return
    for container, rate, total in containers:
        name: Suspect = "growing cache" if isinstance(container, dict) else "growing list"
        yield _Grown(name, round(100 * total), _told(f"{_place(container)} of {len(container):,}", rate))
    for (kind, size), rate in kinds.items():
        yield _Grown("growing tensors", round(100 * rate * size), _told(f"tensors {kind}", rate))
    for cls, rate, total in grown_types(looks):
        what = f"objects of {cls.__module__}.{cls.__qualname__}"
        yield _Grown("growing objects", round(100 * total), _told(what, rate))


def _holds_graph(container: Any) -> bool:
    values = container.values() if isinstance(container, dict) else container
    return any(isinstance(each, torch.Tensor) and each.grad_fn is not None for each in values)


def _place(container: Any) -> str:
    where = holder(container)
    return f"a {type(container).__name__}{where and f' ({where})'}"


def _told(what: str, rate: float) -> str:
    return f"{what}, {rate:,.1f} more a step"


def growth_per_100_steps(held: Sequence[int]) -> int | None:
    """Bytes by which memory grows in 100 steps, from what was held after each; None from fewer than 17.

    The first third is left out, in which allocators and kernels get what they then keep. The rest is divided into
    blocks, and the growth is the median (the lower of two) of the differences between the least of each: a jump, or a
    step that holds more for a while, does not count."""
    held = held[len(held) // 3 :]
    width = len(held) // BLOCKS
    if width < 2:
        return None
    least = [min(held[i : i + width]) for i in range(0, len(held) - width + 1, width)]
    return round(statistics.median_low(b - a for a, b in pairwise(least)) * 100 / width)


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO]


@cache
def _mallinfo() -> Any:
    found = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if found is not None:
        found.restype = _Mallinfo
    return found


def heap_in_use() -> int:
    """Bytes that C's allocator has given out and not got back: what it keeps for later is not in them, as it is in the
    resident set. 0 where that is not known. Takes up to a millisecond."""
    if (mallinfo := _mallinfo()) is None:
        return 0
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)
