"""Encoded rows that a model is asked, and the file in which a run keeps them: JSON lines, one a row."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray

from qft.data.sources import place
from qft.errors import DataError
from qft.files import atomic_file

COLUMNS = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "length": Value("int32"),
        "supervised": Value("int32"),
        "weights": List(Value("float32")),
        "answer_start": Value("int32"),
        "source": Value("int32"),
        "row": Value("int64"),
        "images": List(Value("string")),
        "rendered": Value("string"),
    }
)
"""Of encoded rows, or of each example that a row became. input_ids and labels: [tokens]; length and supervised, in
tokens; weights: what each token counts in the loss of a training [tokens], empty: 1 of each label; answer_start: index
of the first token of the last turn that is learnt, -1 if that is cut and in plain text;
source and row: where it stands; images: a reference of each (qft.data.images), and rendered: the text before the
processor put in what stands for them, empty without any."""
LATER: dict[str, Any] = {"images": [], "rendered": "", "weights": []}
"""Of files from before there were images and weights."""


def column(rows: Dataset, name: str) -> NDArray[Any]:
    """A column of numbers or of texts, at once."""
    found = rows.select_columns([name]).with_format("arrow")[:]
    values: NDArray[Any] = found[name].to_numpy()
    return values


@dataclass(frozen=True)
class EncodedRows:
    """Rows of one part, and where each of them stands."""

    part: str
    """train or eval"""
    rows: Dataset
    """With COLUMNS."""
    places: Mapping[int, tuple[str, str]]
    """Path and unit of each source, by its number in the column `source`."""

    def place(self, source: int, row: int) -> str:
        """`file:line` of a row, by its source and row columns."""
        return place(*self.places[source], row)


def write_rows(path: Path, encoded: EncodedRows) -> None:
    """Write one line a row: its part, the path and unit of its source, and COLUMNS; atomically."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for row in encoded.rows:
            source, unit = encoded.places[row["source"]]
            line = {"part": encoded.part, "path": source, "unit": unit, **row}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_rows(path: Path, limit: int | None = None) -> EncodedRows:
    """What `write_rows` wrote, at most its first `limit` rows. Raises DataError for another file."""
    try:
        with path.open(encoding="utf-8") as stream:
            lines = [json.loads(line) for line in islice(stream, limit)]
        kept = [{name: (LATER | line)[name] for name in COLUMNS} for line in lines]
        rows = Dataset.from_list(kept, features=COLUMNS)
        return EncodedRows(lines[0]["part"], rows, {line["source"]: (line["path"], line["unit"]) for line in lines})
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"{path}: holds no encoded rows; without the file, the data is encoded again") from error
