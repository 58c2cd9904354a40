"""Which examples share a row: rows that are full waste nothing on padding.

Examples stay what they are; a packed row is a list of them, which the collator lays one behind the other with
positions that begin anew and the borders between them.
"""

import bisect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from qft.data.encoded import column

Packs = list[list[int]]


def best_fit(lengths: Sequence[int] | NDArray[np.int64], room: int) -> Packs:
    """Indices of `lengths` that share a row of `room` tokens, by best-fit decreasing: the longest first, each into the
    fullest row that has room for it. Rows, and what is in each, go by their first index."""
    waiting: dict[int, list[list[int]]] = {}
    left: list[int] = []
    """Rooms that any row has left, in order, each once."""
    packs: Packs = []
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[index])
        at = bisect.bisect_left(left, length)
        if at < len(left):
            size = left[at]
            pack = waiting[size].pop()
            if not waiting[size]:
                del waiting[size], left[at]
        else:
            size, pack = room, []
            packs.append(pack)
        pack.append(index)
        rest = size - length
        if rest not in waiting:
            waiting[rest] = []
            bisect.insort(left, rest)
        waiting[rest].append(pack)
    return sorted((sorted(pack) for pack in packs), key=lambda pack: pack[0])


class PackedRows:
    """Examples, several to a row; each row is a list of them, which is read when it is asked for."""

    def __init__(self, examples: Dataset, packs: Packs) -> None:
        self.examples, self.packs = examples, packs
        of_each = column(examples, "length")
        self.lengths: NDArray[np.int64] = np.array([of_each[pack].sum() for pack in packs], dtype=np.int64)
        """Tokens of each row."""

    def __len__(self) -> int:
        return len(self.packs)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return (self[number] for number in range(len(self)))

    def __getitems__(self, numbers: Sequence[int]) -> list[list[dict[str, Any]]]:
        return [self[number] for number in numbers]

    def __getitem__(self, number: int) -> list[dict[str, Any]]:
        columns = self.examples[self.packs[number]]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
