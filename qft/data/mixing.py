"""How often the rows of each source are seen in an epoch."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from qft.data.encoded import column
from qft.documents.plan import SourceFacts
from qft.errors import DataError
from qft.recipe.data import DataSection

MOST = 10**8
"""Rows of a source, once its weight has repeated them; train.num_train_epochs repeats all of them."""

Ints = NDArray[np.int64]


def row_numbers(examples: Dataset) -> Ints:
    """For each example, which row it comes from, counted from 0: those of one row lie together."""
    places = np.array([column(examples, name) for name in ("source", "row")])
    numbers: Ints = np.cumsum(np.any(places[:, 1:] != places[:, :-1], axis=0)) if len(examples) else np.zeros(0, int)
    return np.concatenate([[0], numbers])[: len(examples)]


def weigh(
    rows: Dataset, facts: Sequence[SourceFacts], data: DataSection, seed: int
) -> tuple[Dataset, list[SourceFacts]]:
    """Repeat, or draw a part of, each source's rows as its weight says, in the order of the sources; and the facts with
    how many times each is seen."""
    sources, numbers = column(rows, "source"), row_numbers(rows)
    held = [np.flatnonzero(sources == number) for number in range(len(facts))]
    told = list(facts)
    if data.mix_by != "times":
        sizes = [column(rows, "length")[own].sum() if data.mix_by == "tokens" else _count(numbers[own]) for own in held]
        times = times_of(sizes, [source.weight for source in facts], data.mix_temperature)
        told = [each.model_copy(update={"weight": many}) for each, many in zip(facts, times, strict=True)]
    if all(source.weight == 1 for source in told):
        return rows, told
    generator = np.random.default_rng(seed)
    chosen: list[Ints] = []
    for own, source in zip(held, told, strict=True):
        if source.weight * len(own) > MOST:
            raise DataError(
                f"{source.path}: its weight {source.weight:g} makes more than {MOST:,} rows of it: lower it"
            )
        distinct = np.unique(numbers[own])
        whole, rest = divmod(round(source.weight * len(distinct)), max(len(distinct), 1))
        part = np.isin(numbers[own], generator.permutation(distinct)[:rest])
        chosen += [own] * whole + [own[part]]
    return rows.select(np.concatenate(chosen)), told


def times_of(sizes: Sequence[int], weights: Sequence[float], temperature: float) -> list[float]:
    """How many times each source of so many rows or tokens is seen, so that its share is as weight * size ** (1 /
    temperature), and all together are as many as without; 1 of an empty one."""
    shares = np.array([weight * size ** (1 / temperature) for size, weight in zip(sizes, weights, strict=True)])
    wanted = shares / max(shares.sum(), 1e-300) * sum(sizes)
    return [float(many / size) if size else 1.0 for many, size in zip(wanted, sizes, strict=True)]


def _count(numbers: Ints) -> int:
    return len(np.unique(numbers))
