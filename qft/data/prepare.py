"""The data section of a recipe -> encoded train and eval rows, and what was found on the way."""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets, disable_caching, disable_progress_bars, enable_progress_bars
from datasets.fingerprint import generate_random_fingerprint
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qft.data.encoded import COLUMNS, EncodedRows, column, stored
from qft.data.kept import FEWEST, fingerprint, kept
from qft.data.mixing import row_numbers, weigh
from qft.data.packing import PackedRows, best_fit
from qft.data.pictures import Pictures
from qft.data.reader import FEATURES, LEARNT_BY, LOOKED, RowReader, encoder_of, reader_of, stopping
from qft.data.sources import Rows, open_source, place
from qft.data.stream import Stream, open_stream
from qft.documents.plan import SourceFacts
from qft.errors import DataError
from qft.progress import BARS
from qft.recipe import Source
from qft.recipe.data import DataSection

SHOWN = 10
"""Bad rows that a message lists."""

OF_A_PROCESS = 2000
"""Rows that are worth one more process, and a progress bar."""
KEPT = 32
"""Training rows that stand in for held-out rows where none are held out."""

Ints = NDArray[np.int64]
Chosen = tuple[Rows, Sequence[int]]
"""A source, and which of its rows are encoded."""


@dataclass(frozen=True)
class Prepared:
    """Encoded rows, with COLUMNS."""

    train: Dataset
    eval: Dataset | None
    sources: tuple[SourceFacts, ...]
    batched: Dataset | PackedRows
    """The training rows as batches are made of them: packed, if the recipe says so."""
    looked: Dataset
    """Of each row of the sources that is used, once: source, row and LOOKED."""
    stream: Stream | None = None
    """Where rows are read while they are learnt; all else is then of their first ones alone."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row of `batched`."""
        return self.batched.lengths if isinstance(self.batched, PackedRows) else column(self.batched, "length")

    @cached_property
    def places(self) -> dict[int, tuple[str, str]]:
        """Path and unit of each source, by its number in the column `source`."""
        return {number: (facts.path, facts.unit) for number, facts in enumerate(self.sources)}

    @cached_property
    def weighted(self) -> bool:
        """Whether tokens of training rows count otherwise than others."""
        lists = stored(self.train, "weights")
        return bool(pc.any(pc.greater(pc.list_value_length(lists), 0)).as_py())

    def place(self, source: int, row: int) -> str:
        """`file:line` of a row, by its source and row columns."""
        return place(*self.places[source], row)

    def asked(self) -> EncodedRows:
        """The rows that the trained model is asked: those held out, else the first KEPT of the training."""
        if self.eval is not None:
            return EncodedRows("eval", self.eval, self.places)
        return EncodedRows("train", self.train.select(range(min(KEPT, len(self.train)))), self.places)


def prepare(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, seed: int, pictures: Pictures | None = None
) -> Prepared:
    """Read, encode, split and weight every row; `pictures` reads their images, None: the model reads none.

    Raises DataError listing the bad rows, MissingError without a file."""
    stream = open_stream(data, tokenizer, seed) if data.streaming else None
    chosen = {number: _whole(source) for number, source in enumerate((*data.train, *data.eval)) if stream is None}
    if stream is not None:
        samples = [file.sample() for file in stream.files]
        chosen = {number: (rows, range(len(rows.dataset))) for number, rows in enumerate(samples)}
        chosen |= {number: _whole(source) for number, source in enumerate(data.eval, len(data.train))}
    encoded, facts, looked = _encode_all(data, tokenizer, chosen, pictures)
    train = concatenate_datasets(encoded[: len(data.train)])
    kept_out = concatenate_datasets(encoded[len(data.train) :]) if data.eval else None
    if data.eval_fraction:
        numbers = row_numbers(train)
        drawn = np.isin(numbers, _draw(len(np.unique(numbers)), data.eval_fraction, seed))
        train, kept_out = train.select(np.flatnonzero(~drawn)), train.select(np.flatnonzero(drawn))
    train, facts = weigh(train, facts, data, seed)
    if not len(train):
        raise DataError("data.train: no row is left to use: data.eval_fraction and the weights of sources leave none")
    shared = batched(train, data, facts)
    return Prepared(train, kept_out, tuple(facts), shared, concatenate_datasets(looked), stream)


def batched(train: Dataset, data: DataSection, facts: Sequence[SourceFacts]) -> Dataset | PackedRows:
    """The rows as they are trained on. Raises DataError."""
    if data.is_packed and any(source.images for source in facts):
        raise DataError("rows with images cannot share a row: set data.packing and data.padding_free to false")
    if data.packing:
        assert data.max_length != "auto"  # the plan has decided
        return PackedRows(train, best_fit(column(train, "length"), data.max_length))
    return PackedRows(train, [[number] for number in range(len(train))]) if data.padding_free else train


def held_out(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, seed: int, pictures: Pictures | None = None
) -> EncodedRows | None:
    """The very rows that `prepare` holds out; None if it holds none out. Others are encoded only where some may be
    skipped: data.eval_fraction is drawn among those that are used. Raises what `prepare` does."""
    if not data.eval and not data.eval_fraction:
        return None
    if data.eval_fraction and "skip" in (data.on_bad_row, data.on_too_long):
        return prepare(data, tokenizer, seed, pictures).asked()
    whole = {number: _whole(source) for number, source in enumerate(data.eval, len(data.train))}
    chosen = whole or _drawn(data, seed)
    if not chosen:
        raise DataError("data.train: no row is left to use: all are blank")
    encoded, _, _ = _encode_all(data, tokenizer, chosen, pictures)
    places = {number: (rows.source.path, rows.unit) for number, (rows, _) in chosen.items()}
    return EncodedRows("eval", concatenate_datasets(encoded), places)


def _whole(source: Source) -> Chosen:
    """All rows of a source."""
    rows = open_source(source)
    if not len(rows.dataset):
        raise DataError(f"{source.path}: holds no row")
    return rows, range(len(rows.dataset))


def _drawn(data: DataSection, seed: int) -> dict[int, Chosen]:
    """What data.eval_fraction holds out of each source where every row is used that is not blank."""
    opened = [_whole(source)[0] for source in data.train]
    filled = [rows.filled() for rows in opened]
    drawn = _draw(sum(map(len, filled)), data.eval_fraction, seed)
    indices = np.concatenate(filled)[drawn]
    numbers = np.repeat(np.arange(len(filled)), list(map(len, filled)))[drawn]
    return {int(number): (opened[number], indices[numbers == number].tolist()) for number in np.unique(numbers)}


def _draw(count: int, fraction: float, seed: int) -> Ints:
    """Which of `count` rows are held out, in their order: `fraction` of them and at least one, drawn by `seed`."""
    held: Ints = np.sort(np.random.default_rng(seed).permutation(count)[: max(1, round(count * fraction))])
    return held


def _encode_all(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, chosen: Mapping[int, Chosen], pictures: Pictures | None
) -> tuple[list[Dataset], list[SourceFacts], list[Dataset]]:
    """Of each source, by its number, the chosen rows that can be used, its facts, and what a look at these rows showed.
    Raises DataError listing the rows that must stop the run."""
    disable_caching()
    encoder, stops = encoder_of(data, tokenizer, pictures), stopping(data)
    template = fingerprint(tokenizer)
    usable, facts, looked, bad = [], [], [], []
    skipped: dict[str, str] = {}
    for number, (rows, indices) in chosen.items():
        reader = reader_of(data, encoder, rows, number)
        make = partial(_encode, rows, indices, data.num_proc, reader)
        encoded = kept(_made_of(data, rows, indices, reader, template), make)
        status = column(encoded, "status")
        wrong = encoded.select(np.flatnonzero(np.isin(status, stops)))
        bad += [f"{rows.place(row['row'])}: {row['reason']}" for row in wrong]
        used = _where(encoded, np.isin(status, ["ok", "truncated"]))
        usable.append(used.select_columns([*COLUMNS]))
        wholes = _last_examples(used)
        whole = used if len(wholes) == len(used) else used.select(wholes)
        looked.append(whole.select_columns(["source", "row", *LOOKED]))
        facts.append(_facts(rows, "train" if number < len(data.train) else "eval", reader.format, status, used, wholes))
        if facts[-1].skipped and not facts[-1].rows:
            row = encoded[int(np.flatnonzero(status != "blank")[0])]
            skipped.setdefault(facts[-1].part, f"{rows.place(row['row'])}: {row['reason']}")
    if pictures and any(source.images for source in facts):
        bad += _unseen(usable, chosen, pictures)
    if bad:
        _refuse(bad)
    _require_rows(facts, skipped)
    return usable, facts, looked


def _unseen(usable: Sequence[Dataset], chosen: Mapping[int, Chosen], pictures: Pictures) -> Iterator[str]:
    """Rows of text that say what stands for an image: beside rows that have some, nobody could tell whose it is."""
    for rows, examples in zip((rows for rows, _ in chosen.values()), usable, strict=True):
        for example in examples:
            if not example["images"] and (mark := pictures.stands_for_image(example["input_ids"])):
                yield f"{rows.place(example['row'])}: its text says {mark}, which stands for an image, and it has none"


def _where(rows: Dataset, chosen: NDArray[np.bool_]) -> Dataset:
    """Those that are chosen; all of them as they are, which is faster to read."""
    return rows if chosen.all() else rows.select(np.flatnonzero(chosen))


READ_BY = (*LEARNT_BY, "max_length", "on_too_long", "ignore_fields", "template")
"""Fields of `data` that decide what a row becomes, beside those that the tokenizer has."""


def _made_of(
    data: DataSection, rows: Rows, indices: Sequence[int], reader: RowReader, template: str | None
) -> dict[str, Any] | None:
    """All that encoded rows come of; None: they are few, or of what has no digest."""
    if len(indices) < FEWEST or not isinstance(indices, range) or rows.digest is None or template is None:
        return None
    if reader.encoder.pictures:  # of files of their own
        return None
    asked = {name: getattr(data, name) for name in READ_BY}
    of_source = {"format": reader.format, "unit": rows.unit, "rows": len(indices), "number": reader.source}
    return asked | of_source | {"digest": rows.digest, "source": str(rows.source), "tokenizer": template}


def _encode(rows: Rows, indices: Sequence[int], num_proc: int | Literal["auto"], reader: RowReader) -> Dataset:
    """The examples of the rows at `indices`, as records of FEATURES."""
    environment = os.environ
    processes = min(_cores(), len(indices) // OF_A_PROCESS) if num_proc == "auto" else min(num_proc, len(indices))
    if len(indices) >= OF_A_PROCESS and BARS.get() and sys.stderr.isatty():
        enable_progress_bars()
    try:
        return rows.dataset.select(indices).map(
            reader,
            with_indices=True,
            batched=True,
            fn_kwargs={"indices": indices},
            remove_columns=rows.dataset.column_names,
            features=FEATURES,
            num_proc=processes if processes > 1 else None,
            load_from_cache_file=False,
            new_fingerprint=generate_random_fingerprint(),  # a hash of the reader would hash its tokenizer
            desc=f"Encoding {Path(rows.source.path).name}",
        )
    finally:
        disable_progress_bars()
        os.environ = environment  # noqa: B003  # after several processes datasets leaves a copy in its place


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _last_examples(used: Dataset) -> Ints:
    """Indices of the last example of each row, which holds all of it."""
    found: Ints = np.flatnonzero(np.diff(row_numbers(used), append=-1))
    return found


def _require_rows(facts: Sequence[SourceFacts], skipped: Mapping[str, str]) -> None:
    """Raise DataError for a part of which no row can be used, with one that was `skipped`."""
    for part in dict.fromkeys(each.part for each in facts):
        mine = [each for each in facts if each.part == part]
        if not any(each.rows for each in mine):
            count = sum(each.skipped for each in mine)
            why = f"{count} were skipped, such as {skipped[part]}" if count else "all are blank"
            raise DataError(f"data.{part}: no row is left to use: {why}")


def _facts(rows: Rows, part: str, name: str, status: NDArray[Any], used: Dataset, wholes: Ints) -> SourceFacts:
    """`wholes`: indices of the examples that hold all of their rows."""
    lengths = column(used, "length").astype(np.int64)
    images = len(stored(used, "images").combine_chunks().flatten())
    return SourceFacts(
        path=rows.source.path,
        part=part,
        format=name,
        rows=len(wholes),
        examples=len(used),
        repeated_tokens=int(lengths.sum() - lengths[wholes].sum()),
        unread=_unread(used, wholes),
        skipped=int(np.isin(status, ["bad", "too long"]).sum()),
        truncated=len(np.unique(column(used, "row")[column(used, "status") == "truncated"])),
        tokens=int(lengths.sum()),
        supervised_tokens=int(column(used, "supervised").sum(dtype=np.int64)),
        longest=int(lengths.max(initial=0)),
        digest=_digest(rows, used, images),
        images=images,
        unit=rows.unit,
        weight=rows.source.weight,
    )


def _unread(used: Dataset, wholes: Ints) -> dict[str, int]:
    """Rows that have each field which nobody reads."""
    names = stored(used, "unread").combine_chunks()
    if len(wholes) < len(used):
        names = names.take(pa.array(wholes))
    return dict(Counter(names.flatten().to_pylist()).most_common())


def _digest(rows: Rows, used: Dataset, images: int) -> str | None:
    """Of the source, and of the images that its rows name, so many."""
    if not images:
        return rows.digest
    return hashlib.sha256(f"{rows.digest}{''.join(used['image_digest'])}".encode()).hexdigest()


def _refuse(bad: Sequence[str]) -> None:
    lines = list(bad[:SHOWN])
    if len(bad) > SHOWN:
        lines.append(f"… and {len(bad) - SHOWN} more")
    too_long = ["data.max_length" in line for line in bad]
    remedies = ["data.on_bad_row: skip"] * (not all(too_long)) + ["data.on_too_long (skip, truncate)"] * any(too_long)
    raise DataError("\n".join([*lines, f"{len(bad)} rows cannot be used: mend them, or set {' and '.join(remedies)}"]))
