"""Encoded rows -> padded batches; all tensors are int64 [rows, tokens]."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from qft.data.pictures import Pictures
from qft.data.template import IGNORED
from qft.errors import DataError


def pad_token_id(tokenizer: Any) -> int:
    """A token to pad with. Padding is masked by length, never by id, so any token serves, eos included."""
    tokens = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, 0)
    return int(next(token for token in tokens if token is not None))


def by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of `lengths` in batches of at most `size`, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def model_inputs(
    rows: Sequence[Sequence[int]],
    pad: int,
    *,
    multiple: int = 1,
    most: int | None = None,
    left: bool = False,
    device: Any = None,
) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of rows of token ids, padded on the right, or on the `left`, to the longest one
    rounded up to `multiple` tokens, where that is no more than `most`."""
    sizes = [len(row) for row in rows]
    longest = max(sizes)
    width = -(-longest // multiple) * multiple
    width = width if most is None else max(min(width, most), longest)
    seen = _filled([[1] * size for size in sizes], 0, width, left=left)
    return {"input_ids": _filled(rows, pad, width, left=left).to(device), "attention_mask": seen.to(device)}


def _filled(rows: Sequence[Sequence[int]], fill: int, width: int, *, left: bool = False) -> torch.Tensor:
    """By numpy: torch takes some seven times as long for numbers out of lists, which a small model's step waits for."""
    filled = np.full((len(rows), width), fill, dtype=np.int64)
    for line, row in zip(filled, rows, strict=True):
        line[width - len(row) if left else 0 :][: len(row)] = row
    return torch.from_numpy(filled)


def pictured_inputs(
    rows: Sequence[Mapping[str, Any]], pad: int, pictures: Pictures | None, *, device: Any, left: bool = False
) -> dict[str, torch.Tensor]:
    """Of encoded rows, what `model_inputs` gives, and what the model is given of their images."""
    inputs = model_inputs([row["input_ids"] for row in rows], pad, left=left, device=device)
    if pictures:
        seen = pictures.inputs(rows, inputs["input_ids"].shape[1], left=left)
        inputs |= {name: value.to(device) for name, value in seen.items()}
    return inputs


@dataclass(frozen=True)
class Encoded:
    """The rows that a batch with images was made of, for whoever divides it: which tensors of images belong to which
    row, only the model's processor knows."""

    rows: list[Any]


UNFORESEEN = "a streamed row says by weight that a turn counts less, and none of the first rows did: put one among them"


@dataclass(frozen=True)
class Collator:
    """Pads on the right to the longest row, rounded up to `multiple` tokens, but to no more than `most`.

    Gives input_ids, attention_mask and labels; and for each row, on the host, `rows` (source and row of each of its
    examples, for messages) and `learnt_tokens`, the number of labels that are learnt; with images, `encoded` too.

    Rows that are lists of examples are packed: the first token of an example is predicted by nothing, and so not
    learnt. Of these it gives position_ids, and `lengths` of the examples in each row; there is no padding where they
    all lie `side_by_side` in one, [1, tokens]."""

    pad: int
    multiple: int = 8
    most: int | None = None
    pictures: Pictures | None = None
    """What reads the images of rows; None: they have none."""
    side_by_side: bool = False
    weighted: bool = False
    """Whether a batch says what each label counts: `loss_weights`, float32 [rows, tokens]. Then whatever counts has a
    label."""

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        packed = [row if isinstance(row, list) else [row] for row in rows]
        if self.weighted:
            packed = [[_weighed(example) for example in row] for row in packed]
        elif any(example.get("weights") for row in packed for example in row):
            raise DataError(UNFORESEEN)
        labels = [_labels(row) for row in packed]
        places = tuple(tuple((example["source"], example["row"]) for example in row) for row in packed)
        learnt = tuple(len(later) - later.count(IGNORED) for later in (row[1:] for row in labels))
        ids = [[*chain.from_iterable(example["input_ids"] for example in row)] for row in packed]
        known: dict[str, Any] = {"rows": places, "learnt_tokens": learnt}
        if not isinstance(rows[0], list):
            inputs = self._padded(ids, labels)
            seen = self.pictures.inputs(rows, inputs["labels"].shape[1]) if self.pictures else {}
            if seen:
                known["encoded"] = Encoded(rows)
            return inputs | seen | known | self._weights(packed, inputs["labels"])
        lengths = tuple(tuple(len(example["input_ids"]) for example in row) for row in packed)
        laid = self._in_one(ids, labels) if self.side_by_side else self._padded(ids, labels)
        borders = (sum(lengths, ()),) if self.side_by_side else lengths
        laid |= self._weights(packed, laid["labels"])
        return laid | known | {"lengths": lengths, "position_ids": _positions(borders, laid["input_ids"].shape[1])}

    def _weights(self, packed: list[list[dict[str, Any]]], labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.weighted:
            return {}
        weights = torch.zeros(labels.shape)
        each = [weight for row in packed for example in row for weight in example["weights"] if weight]
        weights[labels != IGNORED] = torch.tensor(each)
        return {"loss_weights": weights}

    def _padded(self, ids: list[list[int]], labels: list[list[int]]) -> dict[str, Any]:
        inputs = model_inputs(ids, self.pad, multiple=self.multiple, most=self.most)
        return {**inputs, "labels": _filled(labels, IGNORED, inputs["input_ids"].shape[1])}

    def _in_one(self, ids: list[list[int]], labels: list[list[int]]) -> dict[str, Any]:
        """All in one row; the first label of each is not learnt, which its own padding would have kept from it."""
        joined = (label for row in labels for label in (IGNORED, *row[1:]))
        return Collator(self.pad, multiple=1)._padded([[token for row in ids for token in row]], [[*joined]])


def _labels(row: list[dict[str, Any]]) -> list[int]:
    """Of one row: whatever comes behind another example begins with a token that is not learnt."""
    return [*row[0]["labels"], *(label for each in row[1:] for label in (IGNORED, *each["labels"][1:]))]


def _weighed(example: dict[str, Any]) -> dict[str, Any]:
    """With a weight of each token but the first, which nothing predicts, and a label where that is more than 0."""
    weights = example.get("weights") or [float(label != IGNORED) for label in example["labels"]]
    pairs = zip(example["input_ids"][1:], weights[1:], strict=True)
    labels = [IGNORED, *(token if weight else IGNORED for token, weight in pairs)]
    return example | {"weights": [0.0, *weights[1:]], "labels": labels}


def _positions(lengths: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    """int64 [rows, width]: from 0 in each example, and in the padding behind the last."""
    rows = [[torch.arange(length) for length in (*row, width - sum(row))] for row in lengths]
    return torch.stack([torch.cat(row) for row in rows])
