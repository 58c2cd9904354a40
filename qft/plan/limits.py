"""What a model has room for, known from its skeleton: numbers of tokens, and positions where they are a table.

Rotary positions and such are computed, and can go on beyond the length that a model was built for. A table cannot: a
position behind its last row is an error of the kernel that looks it up, on a GPU without a word of what is wrong.
"""

import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qft.checkpoint.language import beside_language
from qft.data.batch import pad_token_id
from qft.errors import DataError, ModelError
from qft.recipe.schema import EvalSection
from qft.recipe.section import Problem

Place = Callable[[int, int], str]
"""`file:line` of a row, by its columns `source` and `row`."""
BATCH = 1000
"""Rows that are looked through at once."""


def table_of_positions(model: PreTrainedModel) -> int | None:
    """Longest sequence, in tokens, that the tables of positions of a skeleton have room for; None: it has none."""
    built_for = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words, rooms, beside = model.get_input_embeddings(), [], tuple(f"{name}." for name in beside_language(model))
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or module is words or f"{name}.".startswith(beside):
            continue
        if re.search("wpe|pos", name.rpartition(".")[2]) or module.num_embeddings == built_for:
            # Some leave the first rows out: OPT and its like by `offset`, RoBERTa those up to the padding's.
            first = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            rooms.append(module.num_embeddings - int(first))
    # GPT-J, CodeGen and CTRL compute theirs once, for so many positions.
    tables = [b for name, b in model.named_buffers() if name.rpartition(".")[2] in ("embed_positions", "pos_encoding")]
    return min([*rooms, *(len(table) for table in tables)], default=None)


def require_known_tokens(
    rows: Iterable[Dataset], place: Place, tokenizer: PreTrainedTokenizerBase, embeddings: int
) -> None:
    """Raise DataError for the first token of encoded rows that the model's embeddings have no row for."""
    for dataset in rows:
        columns = dataset.select_columns(["input_ids", "source", "row"]).with_format("arrow")
        for batch in columns.iter(BATCH):
            ids = batch["input_ids"].combine_chunks().flatten().to_numpy()
            if ids.size and ids.max() >= embeddings:
                row = next(row for row in batch.to_pylist() if max(row["input_ids"], default=0) >= embeddings)
                unknown = unknown_token(row["input_ids"], tokenizer, embeddings)
                raise DataError(f"{place(row['source'], row['row'])}: {unknown}")


def unknown_token(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, embeddings: int) -> str | None:
    """What is wrong with the first of `ids` that the embeddings have no row for; None: they have one for each."""
    beyond = next((number for number in ids if number >= embeddings), None)
    if beyond is None:
        return None
    token = tokenizer.convert_ids_to_tokens(beyond)
    return (
        f"the token {token!r} has the number {beyond}, and the model's embeddings end at {embeddings - 1}: use the "
        "tokenizer that belongs to the model, or a model whose embeddings were made larger"
    )


def require_special_tokens(tokenizer: PreTrainedTokenizerBase, embeddings: int, *, generates: bool) -> None:
    """Raise ModelError if the embeddings have no row for the token that batches are padded with, or, if the model is to
    write, for the one that ends an answer."""
    special = {"pads with": pad_token_id(tokenizer)}
    if generates and tokenizer.eos_token_id is not None:
        special["ends an answer with"] = tokenizer.eos_token_id
    for use, number in special.items():
        if unknown := unknown_token([number], tokenizer, embeddings):
            raise ModelError(f"{tokenizer.name_or_path}: the tokenizer {use} a token that cannot be read: {unknown}")


def answer_problems(rows: Dataset, settings: EvalSection, room: int | None) -> Iterator[Problem]:
    """Yield what is wrong if answers to encoded rows may go beyond a table of `room` positions; None: there is none."""
    asked = rows["answer_start"][: settings.samples]
    longest = int(np.max(asked, initial=0))
    # The last token that is written is not read again.
    if room is not None and longest > 0 and longest + settings.max_new_tokens - 1 > room:
        left = room - longest + 1
        yield (
            "eval.max_new_tokens",
            f"{settings.max_new_tokens} after a prompt of {longest} tokens, and the model's table of positions ends at "
            f"{room}: {f'set it to {left} or less' if left > 0 else 'shorten the rows'}",
        )


def length_problem(field: str, longest: int, room: int | None) -> Iterator[Problem]:
    """Yield what is wrong at `field` if a sequence is longer than a table of `room` positions; None: there is none."""
    if room is not None and longest > room:
        yield field, f"a sequence of {longest} tokens, and the model's table of positions ends at {room}; lower it"
