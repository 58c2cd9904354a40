"""The data section of a recipe -> encoded train and eval rows, and what was found on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets, disable_caching
from transformers import PreTrainedTokenizerBase

from qft.data.formats import FORMATS, detect
from qft.data.sources import BadRow, Rows, decode, open_source, place
from qft.data.template import IGNORED, Encoder, TooLong
from qft.documents.plan import SourceFacts
from qft.errors import DataError
from qft.recipe import Recipe, Source

__all__ = ["Prepared", "prepare"]

SHOWN = 10
"""Bad rows that a message lists."""

FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "length": Value("int32"),
        "supervised": Value("int32"),
        "answer_start": Value("int32"),
        "source": Value("int32"),
        "row": Value("int64"),
        "status": Value("string"),
        "reason": Value("string"),
    }
)


@dataclass(frozen=True)
class Prepared:
    """Encoded rows: columns input_ids and labels (int32 [tokens]); length and supervised, in tokens; answer_start
    (index of the last assistant turn's first token, -1 if that turn is cut and in plain text); source and row, for
    `place`."""

    train: Dataset
    eval: Dataset | None
    sources: tuple[SourceFacts, ...]

    def place(self, source: int, row: int) -> str:
        """`file:line` of a row, by its source and row columns."""
        facts = self.sources[source]
        return place(facts.path, facts.unit, row)


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, encode, split and weight every row. Raises DataError listing the bad rows, MissingError without a file."""
    disable_caching()
    data = recipe.data
    encoder = Encoder(tokenizer, data.max_length, data.on_too_long, data.loss_on)
    facts: list[SourceFacts] = []
    parts: dict[str, list[Dataset]] = {"train": [], "eval": []}
    bad: list[str] = []
    for part, sources in (("train", data.train), ("eval", data.eval)):
        for source in sources:
            encoded, found, problems = _encode(source, part, len(facts), encoder, recipe)
            parts[part].append(encoded)
            facts.append(found)
            bad.extend(problems)
    if bad:
        _refuse(bad)
    train = concatenate_datasets(parts["train"])
    held_out = concatenate_datasets(parts["eval"]) if parts["eval"] else None
    if data.eval_fraction:
        train, held_out = _split(train, data.eval_fraction, recipe.seed)
    train = _weigh(train, facts, recipe.seed)
    for name, rows in (("data.train", train), ("data.eval", held_out)):
        if rows is not None and len(rows) == 0:
            raise DataError(f"{name}: no row is left to use")
    return Prepared(train, held_out, tuple(facts))


def _encode(
    source: Source, part: str, number: int, encoder: Encoder, recipe: Recipe
) -> tuple[Dataset, SourceFacts, list[str]]:
    """One source's usable rows, its facts, and the problems that must stop the run."""
    data = recipe.data
    rows = open_source(source)
    if not len(rows.dataset):
        raise DataError(f"{source.path}: holds no row")
    name: str = source.format if source.format != "auto" else data.format
    if name == "auto":
        name = _detect(rows)
    everything = rows.dataset.map(
        encode_row,
        with_indices=True,
        fn_kwargs={"encoder": encoder, "format_name": name, "source": number},
        remove_columns=rows.dataset.column_names,
        features=FEATURES,
        num_proc=data.num_proc if data.num_proc > 1 else None,
        load_from_cache_file=False,
    )
    status = np.array(everything["status"], dtype=object)
    usable = everything.select(np.flatnonzero((status == "ok") | (status == "truncated")))
    usable = usable.remove_columns(["status", "reason"])
    stops = {kind for kind, policy in (("bad", data.on_bad_row), ("too long", data.on_too_long)) if policy == "stop"}
    problems = [
        f"{rows.place(int(i))}: {everything[int(i)]['reason']}" for i in np.flatnonzero(np.isin(status, list(stops)))
    ]
    lengths = np.array(usable["length"], dtype=np.int64)
    return (
        usable,
        SourceFacts(
            path=source.path,
            part=part,
            format=name,
            rows=len(usable),
            skipped=int(np.isin(status, ["bad", "too long"]).sum()),
            truncated=int((status == "truncated").sum()),
            tokens=int(lengths.sum()),
            supervised_tokens=int(np.array(usable["supervised"], dtype=np.int64).sum()),
            longest=int(lengths.max(initial=0)),
            digest=rows.digest,
            unit=rows.unit,
            weight=source.weight,
        ),
        problems,
    )


def encode_row(row: dict[str, Any], index: int, encoder: Encoder, format_name: str, source: int) -> dict[str, Any]:
    """One raw row as a record of FEATURES; a row that cannot be used carries its reason instead of tokens."""
    record: dict[str, Any] = {
        "input_ids": [],
        "labels": [],
        "length": 0,
        "supervised": 0,
        "answer_start": -1,
        "source": source,
        "row": index,
        "status": "ok",
        "reason": "",
    }
    try:
        fields = decode(row)
        if fields is None:
            return record | {"status": "blank"}
        encoded = encoder(FORMATS[format_name](fields))
    except TooLong as error:
        return record | {"status": "too long", "reason": str(error)}
    except BadRow as error:
        return record | {"status": "bad", "reason": str(error)}
    return record | {
        "input_ids": encoded.input_ids,
        "labels": encoded.labels,
        "length": len(encoded.input_ids),
        "supervised": sum(label != IGNORED for label in encoded.labels[1:]),
        "answer_start": encoded.answer_start,
        "status": "truncated" if encoded.truncated else "ok",
    }


def _detect(rows: Rows) -> str:
    """Format of the first row that can be read at all."""
    unreadable = []
    for index, row in enumerate(islice(rows.dataset, 100)):
        try:
            fields = decode(row)
        except BadRow as error:
            unreadable.append(f"{rows.place(index)}: {error}")
            continue
        if fields is not None:
            try:
                return detect(fields)
            except BadRow as error:
                raise DataError(f"{rows.place(index)}: {error}") from None
    first = unreadable[0] if unreadable else f"{rows.place(0)}: blank"
    raise DataError(f"{first}; nor can any of the next rows be read: is this the right file?")


def _refuse(bad: Sequence[str]) -> None:
    lines = list(bad[:SHOWN])
    if len(bad) > SHOWN:
        lines.append(f"… and {len(bad) - SHOWN} more")
    too_long = ["data.max_length" in line for line in bad]
    remedies = ["data.on_bad_row: skip"] * (not all(too_long)) + ["data.on_too_long (skip, truncate)"] * any(too_long)
    raise DataError("\n".join([*lines, f"{len(bad)} rows cannot be used: mend them, or set {' and '.join(remedies)}"]))


def _split(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Hold `fraction` of the rows out, at least one, drawn by `seed`; both parts keep the file's order."""
    count = max(1, round(len(rows) * fraction))
    held_out = np.random.default_rng(seed).permutation(len(rows))[:count]
    kept = np.setdiff1d(np.arange(len(rows)), held_out)
    return rows.select(kept), rows.select(np.sort(held_out))


def _weigh(rows: Dataset, facts: Sequence[SourceFacts], seed: int) -> Dataset:
    """Repeat, or draw a part of, each source's rows as its weight says."""
    if all(source.weight == 1 for source in facts):
        return rows
    numbers = np.array(rows["source"])
    generator = np.random.default_rng(seed)
    chosen = []
    for number, source in enumerate(facts):
        own = np.flatnonzero(numbers == number)
        whole, rest = divmod(round(source.weight * len(own)), max(len(own), 1))
        chosen += [own] * whole + [np.sort(generator.permutation(own)[:rest])]
    return rows.select(np.concatenate(chosen))
