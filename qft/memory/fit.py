"""The fastest way to train that fits: how many rows at once, and how much each block keeps for its backward pass.

Peaks grow by as much with each row, so two sizes of a micro-batch tell of the others; and they fall by as much with
each block that keeps less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations

from qft.documents.plan import Kept
from qft.memory.predict import Prediction, Predictor
from qft.memory.work import Batch, Step

MOST_ROWS = 64
"""Of a micro-batch that is looked at."""
IDLE_TOKENS = 512
"""A micro-batch of so many tokens keeps the device busy for half of its time."""
BESIDE = 0.2
"""What a step takes beside products and attention, as a share of these."""
NORMS = 0.005
"""Of a step, what making outputs of all norms again adds."""


@dataclass(frozen=True)
class Way:
    """One way to make the same step."""

    rows: int
    """Of a micro-batch."""
    accumulated: int
    """Micro-batches of a step."""
    recomputed: int
    """Blocks that keep less than others, the first ones."""
    peak: int
    """Bytes that the device must have."""
    fits: bool
    speed: float
    """Estimated, as a share of that of large micro-batches with nothing computed again."""
    least: Kept = "inputs"
    """What the first blocks keep."""
    most: Kept = "all"
    """What the others do."""

    def kept(self, layers: int) -> list[Kept]:
        """What each block keeps."""
        return [self.least] * self.recomputed + [self.most] * (layers - self.recomputed)


@dataclass(frozen=True)
class Choice:
    """What may be chosen."""

    rows: Sequence[int]
    """Sizes of a micro-batch."""
    step_rows: int
    """Rows of a step, whatever the size of its micro-batches."""
    kept: Sequence[Kept]
    """What blocks may keep, the least first; of several, the first blocks one and the others another."""
    layers: int
    budget: int
    """Bytes of the device."""
    batch: Callable[[int], Batch]
    """The longest of so many rows."""
    spent: int | None = None
    """Bytes that may be taken beyond what keeping the least takes; None: as many as there are."""


@dataclass(frozen=True)
class _Taken:
    """By a step of which all blocks keep as much."""

    peak: int
    work: float


def row_counts(step_rows: int, rows: int) -> list[int]:
    """Sizes of a micro-batch that make up a step of `step_rows`, of a set of `rows`."""
    most = max(min(step_rows, rows, MOST_ROWS), 1)
    return [size for size in range(1, most + 1) if step_rows % size == 0]


def ways(choice: Choice, predict: Predictor) -> list[Way]:
    """All ways, the fastest that fits first, then the others that fit, then the rest by what they take."""
    found = [way for rows in choice.rows for way in _of_rows(rows, choice, predict)]
    return sorted(found, key=lambda way: (not way.fits, -way.speed if way.fits else way.peak, -way.rows))


def _of_rows(rows: int, choice: Choice, predict: Predictor) -> Iterator[Way]:
    """With all blocks keeping the most, or the least, and, if the one fits and the other does not, with the best that
    lies between."""
    taken = cache(partial(_at_rows, rows, choice, predict))
    least, most = choice.kept[0], choice.kept[-1]
    spent = math.inf if choice.spent is None else taken(least).peak + choice.spent
    budget, tokens = min(choice.budget, spent), rows * choice.batch(rows).tokens

    def way(recomputed: int, lower: Kept, upper: Kept) -> Way:
        peak = _between(taken(lower).peak, taken(upper).peak, recomputed, choice.layers)
        work = [taken(upper).work, taken(lower).work]
        more = work[0] + (work[1] - work[0]) * recomputed / max(choice.layers, 1) - taken(most).work
        speed = tokens / (tokens + IDLE_TOKENS) / (1 + more / (taken(most).work * (1 + BESIDE)))
        return Way(rows, choice.step_rows // rows, recomputed, peak, peak <= budget, speed, lower, upper)

    yield (fastest := way(0, least, most))
    if least != most:
        yield (smallest := way(choice.layers, least, most))
        if fastest.fits or not smallest.fits:
            return
        between = [way(_fewest(way, lower, upper, choice.layers), lower, upper)
                   for lower, upper in combinations(choice.kept, 2)]  # fmt: skip
        best = max(between, key=lambda way: (way.fits, way.speed))
        if best.kept(choice.layers) not in ([least] * choice.layers, [most] * choice.layers):
            yield best


def _fewest(way: Callable[[int, Kept, Kept], Way], lower: Kept, upper: Kept, layers: int) -> int:
    """Blocks that must keep no more than `lower` for the rest to fit."""
    return next((recomputed for recomputed in range(layers) if way(recomputed, lower, upper).fits), layers)


def _between(lower: int, upper: int, recomputed: int, layers: int) -> int:
    """Bytes with so many blocks that keep less. The first of them saves the least, and is not counted on: while a block
    is computed again, it is there as if it had been kept."""
    if recomputed == layers:
        return lower
    share = max(recomputed - 1, 0) / (layers - 1) if layers > 1 else 0
    return math.ceil(upper + share * (lower - upper))


def _at_rows(rows: int, choice: Choice, predict: Predictor, kept: Kept) -> _Taken:
    """What a micro-batch of so many rows takes."""
    few = [size for size in choice.rows if size > 1][:2]
    accumulates = choice.step_rows > rows

    def predicted(size: int) -> Prediction:
        return predict(Step(choice.batch(size), kept, accumulates))

    def longer(work: float) -> float:
        return work * (1 + (NORMS if kept in ("attention", "products") else 0.0))

    if rows == 1 or len(few) < 2 or rows in few or not accumulates:
        found = predicted(rows)
        return _Taken(found.taken, longer(found.work))
    first, second = map(predicted, few)
    steps = (rows - few[1]) / (few[1] - few[0])
    grown = (peak.total + steps * (peak.total - first.parts[part].total) for part, peak in second.parts.items())
    peak = second.taken - second.peak.total + math.ceil(max(grown))
    return _Taken(peak, longer(second.work + steps * (second.work - first.work)))
