"""The fastest way to train that fits: how many rows at once, and how many blocks are computed again.

Peaks grow by as much with each row, so two sizes of a micro-batch tell of the others; and they fall by as much with
each block that is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qft.memory.predict import Prediction, Predictor
from qft.memory.trace import Batch, Step

MOST_ROWS = 64
"""Of a micro-batch that is looked at."""
IDLE_TOKENS = 512
"""A micro-batch of so many tokens keeps the device busy for half of its time."""
AGAIN = 1 / 3
"""Of a step, what computing all blocks again adds."""


@dataclass(frozen=True)
class Way:
    """One way to make the same step."""

    rows: int
    """Of a micro-batch."""
    accumulated: int
    """Micro-batches of a step."""
    recomputed: int
    """Blocks that are computed again in the backward pass, the first ones."""
    peak: int
    """Bytes that the device must have."""
    fits: bool
    speed: float
    """Estimated, as a share of that of large micro-batches with nothing computed again."""


@dataclass(frozen=True)
class Choice:
    """What may be chosen."""

    rows: Sequence[int]
    """Sizes of a micro-batch."""
    step_rows: int
    """Rows of a step, whatever the size of its micro-batches."""
    recomputed: Sequence[bool]
    """Whether blocks may be computed again: [True, False] is anything between all and none."""
    layers: int
    budget: int
    """Bytes of the device."""
    batch: Callable[[int], Batch]
    """The longest of so many rows."""


def row_counts(step_rows: int, rows: int) -> list[int]:
    """Sizes of a micro-batch that make up a step of `step_rows`, of a set of `rows`."""
    most = max(min(step_rows, rows, MOST_ROWS), 1)
    return [size for size in range(1, most + 1) if step_rows % size == 0]


def ways(choice: Choice, predict: Predictor) -> list[Way]:
    """All ways, the fastest that fits first, then the others that fit, then the rest by what they take."""
    found = [way for rows in choice.rows for way in _of_rows(rows, choice, predict)]
    return sorted(found, key=lambda way: (not way.fits, -way.speed if way.fits else way.peak, -way.rows))


def _of_rows(rows: int, choice: Choice, predict: Predictor) -> Iterator[Way]:
    taken = {again: _at_rows(rows, again, choice, predict) for again in choice.recomputed}
    blocks = {choice.layers if again else 0 for again in choice.recomputed}
    if len(taken) == 2:
        blocks.add(_fewest(taken, choice.layers, choice.budget))
    for recomputed in sorted(blocks):
        peak = _between(taken, recomputed, choice.layers)
        tokens = rows * choice.batch(rows).tokens
        speed = tokens / (tokens + IDLE_TOKENS) / (1 + AGAIN * recomputed / max(choice.layers, 1))
        yield Way(rows, choice.step_rows // rows, recomputed, peak, peak <= choice.budget, speed)


def _fewest(taken: Mapping[bool, int], layers: int, budget: int) -> int:
    """Blocks that must be computed again for the rest to fit."""
    fits = (recomputed for recomputed in range(layers) if _between(taken, recomputed, layers) <= budget)
    return next(fits, layers)


def _between(taken: Mapping[bool, int], recomputed: int, layers: int) -> int:
    """Bytes with so many blocks computed again. The first of them saves the least, and is not counted on: while a block
    is computed again, it is there as if it had been kept."""
    if len(taken) == 1:
        return next(iter(taken.values()))
    if recomputed == layers:
        return taken[True]
    share = max(recomputed - 1, 0) / (layers - 1)
    return math.ceil(taken[False] + share * (taken[True] - taken[False]))


def _at_rows(rows: int, again: bool, choice: Choice, predict: Predictor) -> int:
    """Bytes that a micro-batch of so many rows takes."""
    few = [size for size in choice.rows if size > 1][:2]
    accumulates = choice.step_rows > rows

    def predicted(size: int) -> Prediction:
        return predict(Step(choice.batch(size), again, accumulates))

    if rows == 1 or len(few) < 2 or rows in few:
        return predicted(rows).taken
    first, second = map(predicted, few)
    steps = (rows - few[1]) / (few[1] - few[0])
    grown = (peak.total + steps * (peak.total - first.parts[part].total) for part, peak in second.parts.items())
    return second.taken - second.peak.total + math.ceil(max(grown))
