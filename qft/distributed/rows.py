"""Which rows each process takes: of every optimizer step and every evaluation those that one process alone would take,
each once. Where rows do not divide, fillers take their place, of which nothing is learnt and nothing counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import BatchSampler, Dataset, Sampler

from qft.data.template import IGNORED

Places = tuple[tuple[int, int], ...]
"""Source and row of each."""
FILLER_TOKENS = 8
FILLER = -1
"""Source of a filler, in the column of that name."""


class Filled(Dataset[Any]):
    """The rows, and at the index behind the last a filler: the beginning of the first row, with nothing to learn."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        count = len(self.rows)
        found = iter(self.rows.__getitems__([index for index in indices if index < count]))
        return [next(found) if index < count else self._filler() for index in indices]

    def _filler(self) -> Any:
        row = self.rows[0]
        first = row[0] if isinstance(row, list) else row
        ids = first["input_ids"][:FILLER_TOKENS]
        empty = {"labels": [IGNORED] * len(ids), "weights": [], "length": len(ids), "source": FILLER}
        made = {**first, "input_ids": ids, **empty}
        return [made] if isinstance(row, list) else made


class FilledBatches(BatchSampler):
    """Batches of another sampler, all of one size and as many for each of `processes`, with fillers at the end."""

    def __init__(self, batches: Any, processes: int) -> None:
        self.batches, self.processes = batches, processes
        self.batch_size, self.drop_last = batches.batch_size, False

    @property
    def sampler(self) -> Sampler[int]:
        """Whose order follows the epoch."""
        sampler: Sampler[int] = self.batches.sampler
        return sampler

    @sampler.setter
    def sampler(self, sampler: Sampler[int]) -> None:
        self.batches.sampler = sampler

    def __len__(self) -> int:
        return -(-len(self.batches) // self.processes) * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        filler, count = len(self.sampler), 0  # type: ignore[arg-type]
        for count, batch in enumerate(self.batches, 1):  # noqa: B007
            yield [*batch, *[filler] * (self.batch_size - len(batch))]
        for _ in range(-count % self.processes):
            yield [filler] * self.batch_size


def real(row: Places) -> Places:
    """Of what a row of a batch is made of, what is no filler."""
    return tuple(place for place in row if place[0] != FILLER)
