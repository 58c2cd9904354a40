"""Encoded rows -> padded batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qft.data.template import IGNORED

__all__ = ["Collator", "pad_token_id"]


def pad_token_id(tokenizer: Any) -> int:
    """A token to pad with. Padding is masked by length, never by id, so any token serves, eos included."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id):
        if token is not None:
            return int(token)
    return 0


@dataclass(frozen=True)
class Collator:
    """Pads on the right to the longest row, rounded up to `multiple` tokens.

    Gives input_ids, attention_mask and labels (int64 [rows, tokens]) and `rows` (int64 [rows, 2]: source and row of
    each, for messages).
    """

    pad: int
    multiple: int = 8

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.multiple) * self.multiple
        shape = (len(rows), width)
        input_ids = torch.full(shape, self.pad)
        labels = torch.full(shape, IGNORED)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            input_ids[i, :n] = torch.tensor(row["input_ids"])
            labels[i, :n] = torch.tensor(row["labels"])
            attention_mask[i, :n] = 1
        places = torch.tensor([[row["source"], row["row"]] for row in rows])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "rows": places}
