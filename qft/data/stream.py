"""Rows that are read, encoded and packed while they are learnt: sets that are larger than memory, or than what the disk
has room for twice.

A file of lines is read where it lies, in blocks of lines whose beginnings are all that is kept of it; others in blocks
of rows, from where `datasets` keeps them. A window is some blocks,
drawn from all of them, whose rows are put in another order; examples are numbered through all windows, so that a seed
and a number say which one it is, whichever process asks for it, and a run goes on at the number where it stopped.
"""

import hashlib
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qft.data.columns import require_sound
from qft.data.encoded import COLUMNS
from qft.data.packing import best_fit
from qft.data.reader import RowReader, encoder_of, reader_of, stopping
from qft.data.sources import JSON_COLUMN, TEXT_COLUMN, Rows, missing, not_utf8, open_unchecked, place
from qft.errors import DataError
from qft.recipe import Source
from qft.recipe.data import DataSection

BLOCK = 64
"""Lines of a block."""
BLOCKS, BYTES = 16, 2**24
"""Of a window, at most; one block is one at least."""
SAMPLE = 1024
"""Rows of each source, from its beginning, that are looked at before a training."""
COLUMN = {".jsonl": JSON_COLUMN, ".txt": TEXT_COLUMN, ".md": TEXT_COLUMN}
"""Of the files that are read so, where the text of a line goes."""

Ints = NDArray[np.int64]
Batch = dict[str, list[Any]]
"""The raw rows of a block, by their columns."""
Items = list[Any]
"""Examples, or lists of those that share a row."""


@dataclass(frozen=True)
class Lines:
    """A file, and where its blocks begin."""

    source: Source
    starts: Ints
    """Byte of each block's first line; then the file's size."""
    lines: int
    digest: str
    sums: NDArray[np.uint32]
    """CRC-32 of each block, by which it is known when it is read again, hours later."""

    @property
    def column(self) -> str:
        return COLUMN[Path(self.source.path).suffix.lower()]

    def read(self, block: int, most: int = BLOCK) -> list[str]:
        """Its lines, without their ends. Raises DataError for a line that is no UTF-8, and where the file has changed
        since it was first read."""
        with open(self.source.path, "rb") as stream:
            stream.seek(int(self.starts[block]))
            raw = stream.read(int(self.starts[block + 1] - self.starts[block]))
        if zlib.crc32(raw) != self.sums[block]:
            way = "put back what was there, and a training goes on by --resume"
            raise DataError(f"{self.place(block * BLOCK)}: the file has changed since it was first read; {way}")
        lines = raw.removeprefix(b"\xef\xbb\xbf" if block == 0 else b"").removesuffix(b"\n").split(b"\n")
        return [self._text(line, block * BLOCK + at) for at, line in enumerate(lines[:most])]

    def _text(self, line: bytes, number: int) -> str:
        line = line.removesuffix(b"\r")
        if b"\r" in line:  # which ends a line for whoever reads the file otherwise
            text = "a carriage return within it: end lines by \\n or \\r\\n, or set data.streaming to false"
            raise DataError(f"{self.source.path}:{number + 1}: {text}")
        try:
            return line.decode()
        except UnicodeDecodeError:
            raise DataError(not_utf8(Path(self.source.path))) from None

    def batch(self, block: int) -> Batch:
        return {self.column: self.read(block)}

    def place(self, row: int) -> str:
        return place(self.source.path, "line", row)

    def sample(self) -> Rows:
        """Its first rows, to be looked at."""
        blocks = range(min(SAMPLE // BLOCK, len(self.starts) - 1))
        texts = [text for block in blocks for text in self.read(block)]
        return Rows(self.source, Dataset.from_dict({self.column: texts}), "line", self.digest)


@dataclass(frozen=True)
class Table:
    """A source whose rows `datasets` keeps on disk, to be read from there as they are needed."""

    rows: Rows

    @property
    def source(self) -> Source:
        return self.rows.source

    @property
    def lines(self) -> int:
        """Its rows."""
        return len(self.rows.dataset)

    @cached_property
    def starts(self) -> Ints:
        """Byte of each block's first row, were all as long; then the size of all."""
        count = -(-self.lines // BLOCK)
        return np.linspace(0, self.rows.dataset.data.nbytes, count + 1).astype(np.int64)

    def batch(self, block: int) -> Batch:
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        try:
            found: Batch = self.rows.dataset[part]
        except (ValueError, OverflowError):  # which row it is
            require_sound(self.rows.dataset, self.source.path)
            raise
        return found

    def place(self, row: int) -> str:
        return self.rows.place(row)

    def sample(self) -> Rows:
        """Its first rows, to be looked at."""
        first = self.rows.dataset.select(range(min(SAMPLE, self.lines)))
        require_sound(first, self.source.path)
        return replace(self.rows, dataset=first)


def open_table(source: Source) -> Table:
    """Raises MissingError, DataError."""
    rows = open_unchecked(source)
    if not len(rows.dataset):
        raise DataError(f"{source.path}: holds no row")
    return Table(rows)


def find_lines(source: Source) -> Lines:
    """One pass over a file. Raises MissingError, DataError."""
    path = Path(source.path)
    if not path.is_file():
        raise missing(path)
    digest, starts, lines, at, size = hashlib.sha256(), [np.zeros(1, np.int64)], 0, 0, path.stat().st_size
    sums, under_way = list[int](), 0
    with path.open("rb") as stream:
        while chunk := stream.read(min(2**22, size - at)):
            digest.update(chunk)
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
            first = -(lines + 1) % BLOCK
            starts.append(ends[first::BLOCK] + at + 1)
            begin = 0
            for end in (ends[first::BLOCK] + 1).tolist():
                sums.append(zlib.crc32(memoryview(chunk)[begin:end], under_way))
                begin, under_way = end, 0
            under_way = zlib.crc32(memoryview(chunk)[begin:], under_way)
            lines, at, last = lines + len(ends), at + len(chunk), chunk[-1:]
    if not size:
        raise DataError(f"{path}: the file is empty")
    found = np.concatenate(starts)
    found = np.append(found[found < size], size)
    of_blocks = np.array([*sums, under_way][: len(found) - 1], np.uint32)
    return Lines(source, found, lines + (last != b"\n"), digest.hexdigest(), of_blocks)


@dataclass(frozen=True)
class Stream:
    """The examples of all passes over the sources, by their number; or rows that are packed of them."""

    files: Sequence[Lines | Table]
    readers: Sequence[RowReader]
    seed: int
    shuffled: bool
    stops: tuple[str, ...]
    """Of rows that cannot be used, the kinds that end a training."""
    room: int | None = None
    """Tokens of a packed row; 1: each example is one; None: they are not packed."""
    length: int = 0
    """Examples, or rows, that are asked for."""
    refused: frozenset[str] = frozenset()
    """Findings that end a training."""
    ends: list[int] = field(default_factory=list, compare=False)
    """Behind each window, in their order, how many there were; of those that were encoded so far."""

    def __post_init__(self) -> None:
        cached: Callable[[int], Any]
        for name in ("windows", "window"):
            cached = lru_cache(2)(getattr(self, name))
            object.__setattr__(self, name, cached)

    def asked(self, length: int, *, shuffled: bool, ends: Sequence[int] = ()) -> "Stream":
        """The same, of so many examples or rows; `ends` as one that was shuffled so has found them."""
        return replace(self, length=length, shuffled=shuffled, ends=[*ends])

    @property
    def lines(self) -> int:
        """Of all files, blank ones among them."""
        return sum(file.lines for file in self.files)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Any:
        if not 0 <= number < self.length:
            raise IndexError(number)
        while number >= (self.ends[-1] if self.ends else 0):
            self._count()
        at = bisect_right(self.ends, number)
        return self.window(*self._turn(at))[number - (self.ends[at - 1] if at else 0)]

    def __getitems__(self, numbers: Sequence[int]) -> Items:
        return [self[number] for number in numbers]

    def _count(self) -> None:
        """Encode one window more. Raises DataError where a whole pass has nothing."""
        turn, window = self._turn(len(self.ends))
        if turn and not window and self.ends[-1] == 0:
            raise DataError(f"{self.files[0].source.path}: no row is left to use")
        self.ends.append((self.ends[-1] if self.ends else 0) + len(self.window(turn, window)))

    def _turn(self, at: int) -> tuple[int, int]:
        """The pass of a window, and its number in it."""
        turn = 0
        while at >= (count := len(self.windows(turn))):
            turn, at = turn + 1, at - count
        return turn, at

    def windows(self, turn: int) -> list[Ints]:
        """Of one pass over the sources, the blocks of each window, [blocks, (source, block)]."""
        draw = np.random.default_rng((self.seed, turn))
        blocks = np.concatenate([self._blocks(number, draw) for number in range(len(self.files))])
        if self.shuffled:
            blocks = draw.permutation(blocks)
        sizes = np.array([np.diff(self.files[file].starts[block : block + 2])[0] for file, block in blocks])
        parts = np.stack([np.arange(len(blocks)) // BLOCKS, np.cumsum(sizes) // BYTES])
        return np.split(blocks, np.flatnonzero(np.any(np.diff(parts), axis=0)) + 1)

    def _blocks(self, number: int, draw: np.random.Generator) -> Ints:
        """Of a source, as often as its weight says: of what is left over, some are drawn."""
        file = self.files[number]
        own = np.arange(len(file.starts) - 1)
        whole, rest = divmod(file.source.weight * len(own), len(own))
        some = np.sort(draw.permutation(own)[: round(rest)])
        chosen = np.concatenate([*[own] * int(whole), some])
        return np.stack([np.full_like(chosen, number), chosen], axis=1)

    def window(self, turn: int, number: int) -> Items:
        """What its blocks become."""
        examples = [example for file, block in self.windows(turn)[number] for example in self._encoded(file, block)]
        if self.shuffled:
            order = np.random.default_rng((self.seed, turn, number)).permutation(len(examples))
            examples = [examples[at] for at in order]
        if self.room is None:
            return examples
        packs = best_fit([example["length"] for example in examples], self.room) if self.room > 1 else None
        return [[examples[at] for at in pack] for pack in packs] if packs else [[each] for each in examples]

    def _encoded(self, file: int, block: int) -> list[dict[str, Any]]:
        source, reader = self.files[file], self.readers[file]
        batch = source.batch(block)
        count = len(next(iter(batch.values())))
        made = reader(batch, [*range(count)], range(block * BLOCK, block * BLOCK + count))
        records = [dict(zip(made, values, strict=True)) for values in zip(*made.values(), strict=True)]
        for record in records:
            wrong = record["reason"] if record["status"] in self.stops else ""
            for finding in record["findings"]:
                name, _, where = finding.partition(" ")
                wrong = wrong or (f"data.audit.{name} {where}".rstrip() if name in self.refused else "")
            if wrong:
                text = "mend it, or set data.on_bad_row, data.on_too_long or data.audit, and start anew"
                raise DataError(f"{source.place(record['row'])}: {wrong}; {text}")
        usable = (record for record in records if record["status"] in ("ok", "truncated"))
        return [{name: record[name] for name in COLUMNS} for record in usable]


def _is_of_lines(source: Source) -> bool:
    path = Path(source.path)
    return path.is_absolute() and path.suffix.lower() in COLUMN and source.sample_by == "line" and not path.is_dir()


def open_stream(data: DataSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> Stream:
    """The training rows, to be read while they are learnt. Raises MissingError, DataError."""
    files: list[Lines | Table] = [find_lines(each) if _is_of_lines(each) else open_table(each) for each in data.train]
    encoder = encoder_of(data, tokenizer)
    assert data.max_length != "auto"  # the plan has decided
    readers = [reader_of(data, encoder, file.sample(), number) for number, file in enumerate(files)]
    refused = frozenset(name for name, level in data.audit if level == "error")
    room = data.max_length if data.packing else 1 if data.padding_free else None
    return Stream(files, readers, seed, True, stopping(data), room, refused=refused)
