"""Files and hub datasets -> rows that know where they came from.

JSON is kept as text until a row is used, one row a line, so that a broken line is reported by its number and rows
need not share one schema. Everything is read through `datasets`, which keeps it on disk.
"""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, disable_progress_bars, load_dataset

from qft.errors import DataError, MissingError
from qft.files import sha256
from qft.recipe import Source

__all__ = ["JSON_COLUMN", "BadRow", "Rows", "open_source"]

JSON_COLUMN = "__json__"
SUFFIXES = ".jsonl, .json, .csv, .parquet, .txt and .md"


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Rows:
    """The raw rows of one source. `dataset` has the file's columns, or JSON_COLUMN alone, to be read by `decode`."""

    source: Source
    dataset: Dataset
    unit: str
    digest: str | None
    """SHA-256 of a local file, or the commit of a hub dataset where it is known."""

    def place(self, index: int) -> str:
        """Where row `index` (from 0) stands: `data.jsonl:3`, `data.csv: row 3`."""
        return place(self.source.path, self.unit, index)


def place(path: str, unit: str, index: int) -> str:
    return f"{path}:{index + 1}" if unit == "line" else f"{path}: {unit} {index + 1}"


def decode(row: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of a raw row; None for a blank line. Raises BadRow."""
    if JSON_COLUMN not in row:
        return row
    text = row[JSON_COLUMN]
    if not text.strip():
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise BadRow("not valid JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise BadRow(f"a row is a JSON object, not {type(value).__name__}")
    return value


def open_source(source: Source) -> Rows:
    """Open a source. Raises MissingError if it is not there, DataError if it cannot be read at all."""
    disable_progress_bars()
    path = Path(source.path)
    if not path.is_absolute():
        return _hub(source)
    if not path.is_file():
        raise MissingError(f"{path}: no such data file" + (" (it is a folder)" if path.is_dir() else ""))
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot tell what it holds; data files end in {SUFFIXES}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    try:
        dataset, unit = reader(path, source)
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
    except (OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ or error
        raise DataError(f"{path}: cannot be read: {str(cause).splitlines()[0]}") from error
    return Rows(source, dataset, unit, sha256(path))


def _read(kind: str, path: Path, **options: Any) -> Dataset:
    return load_dataset(kind, data_files=glob.escape(str(path)), split="train", **options)


def _jsonl(path: Path, source: Source) -> tuple[Dataset, str]:
    return _read("text", path, features=Features({JSON_COLUMN: Value("string")})), "line"


def _json(path: Path, source: Source) -> tuple[Dataset, str]:
    text = path.read_text("utf-8-sig")
    if not text.lstrip().startswith("["):
        return _jsonl(path, source)  # JSON lines under a .json name
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
    return Dataset.from_dict({JSON_COLUMN: [json.dumps(row, ensure_ascii=False) for row in rows]}), "row"


def _csv(path: Path, source: Source) -> tuple[Dataset, str]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        header = next(csv.reader(stream))
    # Every cell is text: a column of digits must not lose its leading zeros.
    columns = Features({name: Value("string") for name in header})
    return _read("csv", path, features=columns, keep_default_na=False), "row"


def _parquet(path: Path, source: Source) -> tuple[Dataset, str]:
    return _read("parquet", path), "row"


def _text(path: Path, source: Source) -> tuple[Dataset, str]:
    return _read("text", path, sample_by=source.sample_by), source.sample_by


READERS: dict[str, Callable[[Path, Source], tuple[Dataset, str]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
    ".md": _text,
}


def _hub(source: Source) -> Rows:
    try:
        dataset = load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except Exception as error:  # datasets and huggingface_hub raise a dozen unrelated types here
        reason = str(error).splitlines()[0]
        raise MissingError(
            f"{source.path}: not a local file, and the hub dataset cannot be loaded: {reason}"
        ) from error
    checksums = dataset.info.download_checksums or {}
    commit = next((url.rsplit("@", 1)[1].split("/")[0] for url in checksums if "@" in url), source.revision)
    return Rows(source, dataset, "row", commit)
