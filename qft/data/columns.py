"""Rows of files of columns (Parquet, Arrow, hub datasets) as they are read from: nothing decoded, every text a text."""

from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features

from qft.errors import DataError, first_line


def undecoded(rows: Dataset) -> Dataset:
    """With images as the bytes of their files: they are looked at once a row is read."""
    features = Features({name: _as_bytes(feature) for name, feature in rows.features.items()})
    return rows if features == rows.features else rows.cast(features)


def require_sound(rows: Dataset, path: str) -> None:
    """Raise DataError where a file has other bytes than it says: whoever writes one need not look at them."""
    start = 0
    for batch in rows.data.to_batches():
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if _wrong(column):
                row = next(i for i in range(len(column)) if _wrong(column.slice(i, 1)))
                raise DataError(f"{path}: row {start + row + 1}: {name}: {_wrong(column.slice(row, 1))}")
        start += batch.num_rows


def _wrong(column: pa.Array) -> str:
    try:
        column.validate(full=True)
        if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
            pc.min_max(column).as_py()
    except pa.ArrowInvalid as error:
        return "not UTF-8 text" if "UTF8" in str(error) else first_line(error)
    except (OverflowError, ValueError):
        return "a time that no calendar has: write it as a text"
    return ""


def _as_bytes(feature: Any) -> Any:
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {name: _as_bytes(inner) for name, inner in feature.items()}
    return datasets.List(_as_bytes(feature.feature)) if isinstance(feature, datasets.List) else feature
