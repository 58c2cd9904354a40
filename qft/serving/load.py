"""How fast an engine answers when several ask at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import TypeVar

from qft.documents.evaluation import Load
from qft.serving.client import Written

T = TypeVar("T")
LEVELS = (1, 8, 32)
"""Requests at once, unless the command line says others."""
FEWEST = 4
"""Requests of a level."""
TOKENS = 32
"""Of each answer, at most."""


def loads(ask: Callable[[int], Written], levels: Sequence[int]) -> Iterator[Load]:
    """Of each level what so many at once come to; `ask` answers its request of a number from 0 on. One before that is
    not counted: an engine's first request also takes memory and chooses kernels."""
    if levels:
        ask(0)
    for level in levels:
        count = max(level, FEWEST)
        started = time.perf_counter()
        written = at_once(ask, range(1, count + 1), level)
        yield load_of(level, written, time.perf_counter() - started)


def at_once(ask: Callable[[int], T], numbers: Iterable[int], width: int) -> list[T]:
    """Of each number its answer, `width` of them at once. What the first raises ends all that are not asked yet."""
    pool = ThreadPoolExecutor(width)
    try:
        return list(pool.map(ask, numbers))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def load_of(level: int, written: Sequence[Written], seconds: float) -> Load:
    return Load(
        concurrent=level,
        requests=len(written),
        tokens=sum(one.tokens for one in written),
        tokens_per_second=sum(one.tokens for one in written) / max(seconds, 1e-9),
        first_token_seconds=median(one.seconds_to_first for one in written),
    )
