"""Files and hub datasets -> rows that know where they came from.

JSON is kept as text until a row is used, one row a line, so that a broken line is reported by its number and rows
need not share one schema. Everything is read through `datasets`, which keeps it on disk.
"""

import codecs
import csv
import errno
import glob
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, DownloadConfig, Features, Value, disable_progress_bars, load_dataset
from datasets.exceptions import DatasetsError
from numpy.typing import NDArray

from qft.data.columns import require_sound, undecoded
from qft.data.folders import saved, unread
from qft.data.hub import fetched
from qft.data.packed import unpacked
from qft.data.sql import rows_of
from qft.disk import refusal
from qft.errors import DataError, MissingError, OutOfMemoryError, QftError, RunError, causes, first_line
from qft.files import not_a_file, read_json_text, require_pulled, sha256
from qft.recipe import Source
from qft.recipe.spread import DATABASES, is_saved, kind

JSON_COLUMN = "__json__"
TEXT_COLUMN = "__text__"
BETWEEN = re.compile(r"[\s,]*")
"""Of two items of a JSON array that is known to be one."""
CACHE = Path(datasets.config.HF_DATASETS_CACHE)
WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""What the system says of files that are written alone."""
LONGEST_CELL = 2**31 - 1
"""Of a CSV file, in characters; the csv module's own limit is 131072."""
BROKEN = (OSError, ValueError, RuntimeError, csv.Error, DatasetsError, EOFError, zlib.error, lzma.LZMAError)
"""What is raised of files that are not what they seem; compressed ones are unpacked by `datasets`."""
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
"""What they begin with."""
SHOWN_PLACES = 16
MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16"}
MARKS |= {codecs.BOM_UTF16_BE: "UTF-16"}
"""What files of other encodings begin with, the longest first."""
SUFFIXES = ".jsonl, .json, .csv, .parquet, .arrow, .db, .txt and .md (and, packed, .gz or .zst behind it)"


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Rows:
    """The raw rows of one source, to be read by `decode`: `dataset` has the file's columns, or JSON_COLUMN or
    TEXT_COLUMN alone."""

    source: Source
    dataset: Dataset
    unit: str
    digest: str | None
    """SHA-256 of a local file, or the commit of a hub dataset where it is known."""

    def place(self, index: int) -> str:
        """Where row `index` (from 0) stands: `data.jsonl:3`, `data.csv: row 3`."""
        return place(self.source.path, self.unit, index)

    def filled(self) -> NDArray[np.int64]:
        """Indices of the rows that are not blank; only lines of text can be."""
        lines = {JSON_COLUMN, TEXT_COLUMN} & set(self.dataset.column_names)
        if not lines:
            return np.arange(len(self.dataset))
        return np.flatnonzero([bool(text.strip()) for text in self.dataset[lines.pop()]])


def place(path: str, unit: str, index: int) -> str:
    return f"{path}:{index + 1}" if unit == "line" else f"{path}: {unit} {index + 1}"


def some_places(places: Sequence[str]) -> str:
    """The first SHOWN_PLACES of where rows stand, and how many there are more."""
    more = f" and {len(places) - SHOWN_PLACES} more" if len(places) > SHOWN_PLACES else ""
    return f"{', '.join(places[:SHOWN_PLACES])}{more}"


def decode(row: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of a raw row; None for a blank line. Raises BadRow."""
    if TEXT_COLUMN in row:
        return {"text": row[TEXT_COLUMN]} if row[TEXT_COLUMN].strip() else None
    if JSON_COLUMN not in row:
        filled: dict[str, Any] = _filled(row)
        return filled
    text = row[JSON_COLUMN]
    if not text.strip():
        return None
    try:
        value = read_json_text(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # a key that is given twice, or a number of thousands of digits
        raise BadRow(f"not valid JSON: {error}") from None
    except RecursionError:
        raise BadRow("not valid JSON: nested too deeply") from None
    require_characters(value, text)
    if not isinstance(value, dict):
        raise BadRow(f"a row is a JSON object, not {type(value).__name__}")
    return value


def require_characters(value: Any, text: str) -> None:
    """Raise BadRow where escapes of JSON text spell half a surrogate pair, which no tokenizer takes."""
    try:
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"not valid text: \\u{ord(error.object[error.start]):04x} is half a character") from None


def _filled(value: Any) -> Any:
    """Without fields that hold nothing: a file of columns has every field in every row, at every depth. Times and
    decimals as JSON has them."""
    if isinstance(value, dict):
        return {name: _filled(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_filled(inner) for inner in value]
    if isinstance(value, Decimal):
        return float(value)
    return str(value) if isinstance(value, datetime | date | time | timedelta) else value


def open_source(source: Source) -> Rows:
    """Open a source, each row of which can be read. Raises MissingError if it is not there, DataError."""
    rows = open_unchecked(source)
    if not {JSON_COLUMN, TEXT_COLUMN} & {*rows.dataset.column_names}:
        require_sound(rows.dataset, source.path)
    return rows


def open_unchecked(source: Source) -> Rows:
    """The same, whatever its files say of texts that are none: to look at them all takes long where they are large."""
    disable_progress_bars()
    path = Path(source.path)
    if not path.is_absolute():
        found, commit = fetched(source)
        return Rows(source, undecoded(found), "row", commit)
    if is_saved(source.path):
        found, of_files = saved(path, source.split)
        return Rows(source, undecoded(found), "row", of_files)
    if not path.is_file():
        raise missing(path)
    reader = READERS.get(kind(str(path)))
    if reader is None:
        raise DataError(f"{path}: cannot tell what it holds; data files end in {SUFFIXES}")
    if path.stat().st_size <= len(codecs.BOM_UTF8) and path.read_bytes() in (b"", codecs.BOM_UTF8):
        raise DataError(f"{path}: the file is empty")
    require_pulled(path)
    read = path
    try:
        digest = sha256(path)
        read = unpacked(path, digest, CACHE)
        dataset, unit = reader(read, digest, source)
    except BROKEN as error:
        raise _named(_unreadable(read, error), read, path) from error
    except DataError as error:
        raise _named(error, read, path) from None
    return Rows(source, dataset, unit, digest)


def missing(path: Path) -> MissingError:
    """That no data file lies there, and what does."""
    what = not_a_file(path) or (unread(path, READERS) if path.is_dir() else None)
    return MissingError(f"{path}: no such data file" + (f" (it is {what})" if what else ""))


def _named(error: QftError, read: Path, path: Path) -> QftError:
    """Of a file that was read for the one at `path`."""
    return error if read == path else type(error)(str(error).replace(str(read), str(path)))


def _unreadable(path: Path, error: Exception) -> QftError:
    """Of a data file; where `datasets` could not write what it keeps of it, the file is not at fault."""
    for cause in causes(error):
        if isinstance(cause, MemoryError):  # in whatever `datasets` makes of it
            return OutOfMemoryError(f"{path}: this machine has no memory left to read it: {first_line(cause)}")
        if isinstance(cause, UnicodeDecodeError):
            return DataError(not_utf8(path))
        if isinstance(cause, OSError) and cause.errno:
            where = path if cause.filename is None and cause.errno not in WRITING else cause.filename
            if where == path or where == str(path):
                return DataError(refusal(cause, path))
            return RunError(f"{refusal(cause, CACHE)}; rows are kept there (HF_DATASETS_CACHE names another place)")
    text = first_line(error.__cause__ or error)
    return DataError(f"{path}: {'holds no row' if 'corresponds to no data' in text else f'cannot be read: {text}'}")


def not_utf8(path: Path) -> str:
    """Where a file is no text, or what else it is."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                if number == 1 and line.startswith(PACKED):
                    break
                others = [name for mark, name in MARKS.items() if number == 1 and line.startswith(mark)]
                column = len(line[: error.start].decode()) + 1
                what = f" but {others[0]}" if others else f": byte 0x{line[error.start]:02x} at column {column}"
                return f"{path}:{number}: not UTF-8 text{what}"
    return f"{path}: not UTF-8 text"


def _read(kind: str, path: Path, digest: str, **options: Any) -> Dataset:
    # The cache of `datasets` knows a file by its path and time; the digest as a name makes it go by the content too.
    # What it unpacks it would keep by the path alone.
    anew = DownloadConfig(force_extract=True, delete_extracted=True)
    files = glob.escape(str(path))
    return load_dataset(kind, digest, data_files=files, split="train", download_config=anew, **options)


def _lines(path: Path, digest: str, column: str, sample_by: str = "line") -> Dataset:
    features = Features({column: Value("string")})
    return _read("text", path, digest, features=features, sample_by=sample_by, encoding="utf-8-sig")


def _jsonl(path: Path, digest: str, source: Source) -> tuple[Dataset, str]:
    return _lines(path, digest, JSON_COLUMN), "line"


def _json(path: Path, digest: str, source: Source) -> tuple[Dataset, str]:
    text = path.read_text("utf-8-sig")
    if not text.lstrip().startswith("["):
        return _jsonl(path, digest, source)  # JSON lines under a .json name
    try:
        json.loads(text, parse_int=str)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{path}: not valid JSON: nested too deeply") from None
    return Dataset.from_dict({JSON_COLUMN: list(_items(text))}), "row"


def _items(text: str) -> Iterator[str]:
    """The items of a JSON array, each as it is written."""
    decoder, start = json.JSONDecoder(parse_int=str), text.index("[") + 1
    while (start := BETWEEN.match(text, start).end()) < len(text) and text[start] != "]":  # type: ignore[union-attr]
        _, end = decoder.raw_decode(text, start)
        yield text[start:end]
        start = end


def _csv(path: Path, digest: str, source: Source) -> tuple[Dataset, str]:
    csv.field_size_limit(LONGEST_CELL)
    header, last = _csv_shape(path)
    # Every cell is text: a column of digits must not lose its leading zeros.
    columns = Features({name: Value("string") for name in header})
    try:
        return _read("csv", path, digest, features=columns, keep_default_na=False), "row"
    except DatasetsError as error:
        if "EOF inside string" in str(error.__cause__):
            raise DataError(f"{path}:{last}: a quote is not closed") from None
        raise


def _csv_shape(path: Path) -> tuple[list[str], int]:
    """Names of the columns, and the line of the last row. Raises DataError for a row of more or fewer cells: pandas
    would shift them, or leave some empty."""
    header: list[str] = []
    last = start = 1
    with path.open(encoding="utf-8-sig", newline="") as stream:
        lines = csv.reader(stream)
        for cells in lines:
            if not header and ",".join(cells).strip():
                header = [name or f"Unnamed: {i}" for i, name in enumerate(cells)]  # as pandas calls them
            elif len(cells) > 1 or "".join(cells).strip():
                last = start
                if len(cells) != len(header):
                    raise DataError(f"{path}:{start}: {len(cells)} cells, and the header has {len(header)}")
            start = lines.line_num + 1
    if len(set(header)) < len(header):
        raise DataError(f"{path}: two columns of its header have the same name")
    if last == 1:
        raise DataError(f"{path}: no row below the header")
    return header, last


def _parquet(path: Path, digest: str, source: Source) -> tuple[Dataset, str]:
    if not pq.read_metadata(path).num_rows:
        raise DataError(f"{path}: holds no row")
    return undecoded(_read("parquet", path, digest)), "row"


def _arrow(path: Path, digest: str, source: Source) -> tuple[Dataset, str]:
    return undecoded(_read("arrow", path, digest)), "row"


def _text(path: Path, digest: str, source: Source) -> tuple[Dataset, str]:
    return _lines(path, digest, TEXT_COLUMN, source.sample_by), source.sample_by


def _sqlite(path: Path, digest: str, source: Source) -> tuple[Dataset, str]:
    return rows_of(path, digest, source.sql, JSON_COLUMN), "row"


READERS: dict[str, Callable[[Path, str, Source], tuple[Dataset, str]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _text,
    ".md": _text,
    **dict.fromkeys(DATABASES, _sqlite),
}
