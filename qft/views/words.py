"""Figures as people read them: sizes, counts, and curves of one line."""

from __future__ import annotations

from itertools import pairwise

__all__ = ["si", "size", "sparkline"]


BARS = "▁▂▃▄▅▆▇█"


def size(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def si(count: float) -> str:
    """A count with k, M or B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(count) >= limit:
            return f"{count / limit * (10 if unit == 'k' else 1):.1f}{unit}"
    return f"{count:,.0f}"


def sparkline(values: list[float], width: int) -> str:
    """The values as bars, averaged into at most `width` of them."""
    finite = [v for v in values if v == v and abs(v) != float("inf")]
    if not finite:
        return ""
    count = min(width, len(finite))
    edges = [round(i * len(finite) / count) for i in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BARS[round((v - low) / span * (len(BARS) - 1))] for v in means)
