"""Which rows with images are a training's largest batch, as far as a model's towers go."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from qft.data.batch import Collator, pad_token_id
from qft.data.encoded import column
from qft.data.pictures import Pictures
from qft.data.prepare import Prepared
from qft.memory.work import Batch, Seen


@dataclass(frozen=True)
class Looks:
    """Gives batches what the model is given of their images: that of as many rows with the most of these, padded as the
    longest is. Raises DataError for an image that is no more what it was."""

    data: Prepared
    pictures: Pictures | None
    known: dict[tuple[str, int, int], Seen | None] = field(default_factory=dict)

    def trained(self, batch: Batch) -> Batch:
        return self._with("training", self.data.train, batch)

    def evaluated(self, batch: Batch) -> Batch:
        return self._with("evaluation", self.data.eval, batch)

    def answered(self, batch: Batch) -> Batch:
        return self._with("answers", self.data.eval, batch)

    def _with(self, work: str, rows: Dataset | None, batch: Batch) -> Batch:
        if rows is None or self.pictures is None or not any(source.images for source in self.data.sources):
            return batch
        key = work, batch.rows, batch.tokens
        if key not in self.known:
            self.known[key] = seen(rows, batch, self.pictures, asked=work == "answers")
        return replace(batch, seen=self.known[key])


def seen(rows: Dataset, batch: Batch, pictures: Pictures, *, asked: bool = False) -> Seen | None:
    """What the model is given of such a batch of `rows`; None: they have no images. `asked`: they end where their
    answers begin."""
    counts = image_tokens(rows, pictures)
    if not counts.any():
        return None
    most = rows.select(np.argsort(-counts, kind="stable")[: batch.rows])
    padded = Collator(pad_token_id(pictures.tokenizer), batch.tokens, pictures=pictures)(
        [_prompt(row) if asked else row for row in most]
    )
    inputs = {name: value for name, value in padded.items() if torch.is_tensor(value) and name != "labels"}
    return Seen(_digest(inputs), inputs)


def image_tokens(rows: Dataset, pictures: Pictures) -> NDArray[np.int64]:
    """Of each row, how many of its tokens stand for images."""
    ids = rows.select_columns(["input_ids"]).with_format("arrow")[:]["input_ids"].combine_chunks().flatten()
    before = np.concatenate([[0], np.cumsum(np.isin(ids.to_numpy(), [*pictures.standing]))])
    ends = np.cumsum(column(rows, "length").astype(np.int64))
    counts: NDArray[np.int64] = np.diff(before[np.concatenate([[0], ends])])
    return counts


def _prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, **{name: row[name][: row["answer_start"]] for name in ("input_ids", "labels")}}


def _digest(inputs: Mapping[str, torch.Tensor]) -> str:
    """Of all shapes, and of the numbers that are no colours."""
    found = hashlib.sha256()
    for name, value in inputs.items():
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        found.update(b"" if value.is_floating_point() else value.numpy().tobytes())
    return found.hexdigest()
