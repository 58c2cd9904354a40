"""Encoded rows -> padded batches; all tensors are int64 [rows, tokens]."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qft.data.pictures import Pictures
from qft.data.template import IGNORED


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
    longest = max(map(len, rows))
    width = -(-longest // multiple) * multiple
    width = width if most is None else max(min(width, most), longest)
    tensors = []
    for each, fill in ((rows, pad), ([[1] * len(row) for row in rows], 0)):
        gaps = ([fill] * (width - len(row)) for row in each)
        padded = [[*gap, *row] if left else [*row, *gap] for row, gap in zip(each, gaps, strict=True)]
        tensors.append(torch.tensor(padded, device=device))
    return dict(zip(("input_ids", "attention_mask"), tensors, strict=True))


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
class Collator:
    """Pads on the right to the longest row, rounded up to `multiple` tokens, but to no more than `most`.

    Gives input_ids, attention_mask and labels; `rows` (int64 [rows, 2]: source and row of each, for messages); and
    `learnt_tokens`, of each row the number of labels that are learnt, as ints, which never go to a device."""

    pad: int
    multiple: int = 8
    most: int | None = None
    pictures: Pictures | None = None
    """What reads the images of rows; None: they have none."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = model_inputs([row["input_ids"] for row in rows], self.pad, multiple=self.multiple, most=self.most)
        ids = [row["labels"] for row in rows]
        labels = model_inputs(ids, IGNORED, multiple=self.multiple, most=self.most)["input_ids"]
        places = torch.tensor([[row["source"], row["row"]] for row in rows])
        learnt = tuple((labels[:, 1:] != IGNORED).sum(1).tolist())
        if self.pictures:
            inputs |= self.pictures.inputs(rows, labels.shape[1])
        return {**inputs, "labels": labels, "rows": places, "learnt_tokens": learnt}
