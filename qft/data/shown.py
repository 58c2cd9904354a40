"""Encoded rows -> what people look at before they train: the text as the model reads it, and what of it is learnt."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qft.data.images import shown
from qft.data.prepare import Prepared
from qft.data.template import IGNORED
from qft.documents.rows import ShownRow, ShownToken

LONGEST = 4
"""Tokens that one character can take."""


def shown_rows(prepared: Prepared, tokenizer: PreTrainedTokenizerBase, count: int) -> list[ShownRow]:
    """The first `count` rows of each source; those that became several examples, all of them."""
    return [
        _shown(example, prepared, tokenizer)
        for source in range(len(prepared.sources))
        for examples in (prepared.train, prepared.eval)
        if examples is not None
        for example in _first(examples, source, count)
    ]


def _first(examples: Dataset, source: int, count: int) -> Iterator[dict[str, Any]]:
    """Examples of the source's first rows, each once."""
    own = np.flatnonzero(np.array(examples["source"]) == source)
    rows = np.array(examples.select(own)["row"])
    chosen = list(dict.fromkeys(rows.tolist()))[:count]
    seen = set()
    for example in examples.select(own[np.isin(rows, chosen)]):
        key = (example["row"], *example["input_ids"])
        if key not in seen:  # a source's weight repeats it
            seen.add(key)
            yield example


def _shown(example: dict[str, Any], prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> ShownRow:
    ids, learnt = example["input_ids"], [label != IGNORED for label in example["labels"]]
    runs = [[i for i, _ in run] for is_learnt, run in groupby(enumerate(learnt), lambda pair: pair[1]) if is_learnt]
    return ShownRow(
        place=prepared.place(int(example["source"]), int(example["row"])),
        text=tokenizer.decode(ids),
        learnt=[tokenizer.decode([ids[i] for i in run]) for run in runs],
        pieces=list(_tokens(ids, learnt, example["weights"], tokenizer)),
        images=[shown(kept) for kept in example["images"]],
    )


def _tokens(
    ids: Sequence[int], learnt: Sequence[bool], weights: Sequence[float], tokenizer: PreTrainedTokenizerBase
) -> Iterator[ShownToken]:
    """Each token's text; of tokens that make up one character, together."""
    start = 0
    for end in range(1, len(ids) + 1):
        # Some decoders write a token otherwise where a text begins: so each is decoded behind the one before it.
        before = list(ids[max(start - 1, 0) : start])
        text = tokenizer.decode([*before, *ids[start:end]])[len(tokenizer.decode(before)) :]
        if not text.endswith("\ufffd") or end - start == LONGEST or end == len(ids):
            yield ShownToken(text, learnt[start], weights[start] if weights else None)
            start = end
