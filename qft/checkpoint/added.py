"""Tokens that are added to a model: their rows of embeddings and head, and what these start from.

A new token starts as the mean of the pieces that the tokenizer would have split it into. Where the tables have rows
left over, new tokens take those; else the tables grow, to a multiple of MULTIPLE rows, and what no token has becomes
the mean of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qft.recipe.section import Problem
from qft.recipe.training import ModelSection

MULTIPLE = 64
"""Of rows, once a table has to grow: matrix products are fastest so."""
FIELDS = ("model.add_tokens", "model.add_special_tokens")


@dataclass(frozen=True)
class AddedTokens:
    """What a recipe adds to a checkpoint."""

    ids: dict[str, int]
    pieces: dict[int, list[int]]
    """Of each new token's id, those that it is made of at first."""
    rows: int
    """Of the tables, once it is there."""
    stored: PretrainedConfig = field(repr=False)
    """The checkpoint's own configuration."""

    def grown(self, table: torch.Tensor) -> torch.Tensor:
        """A table [rows, ...], or biases [rows], with those of the new tokens."""
        known = table.float()
        more = known.mean(0, keepdim=True).expand(max(self.rows - len(table), 0), *table.shape[1:])
        made = torch.cat([known, more]).to(table.dtype)
        for number, pieces in self.pieces.items():
            made[number] = known[pieces].mean(0).to(table.dtype)
        return made

    def put_into(self, model: Any) -> None:
        """Let the loaded model have them."""
        known = {name: model.get_parameter(name).detach().clone() for name in tables(model)}
        if model.get_input_embeddings().weight.shape[0] != self.rows:
            model.resize_token_embeddings(self.rows, mean_resizing=False)
        for name, table in known.items():
            model.get_parameter(name).data.copy_(self.grown(table))


def tables(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that have a row for each token, of embeddings and head; tied ones by both."""
    owners = (model.get_input_embeddings(), model.get_output_embeddings())
    parameters = [p for owner in owners if owner is not None for p in owner.parameters(recurse=False)]
    every = model.named_parameters(remove_duplicate=False)
    return [name for name, p in every if any(p is each for each in parameters)]


def with_rows(config: PretrainedConfig, rows: int) -> PretrainedConfig:
    """The configuration of a model that knows so many tokens."""
    changed = deepcopy(config)
    changed.get_text_config().vocab_size = rows
    if hasattr(changed, "vocab_size"):
        changed.vocab_size = rows
    return changed


def add_tokens(
    section: ModelSection, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, embeddings: int
) -> tuple[AddedTokens | None, list[Problem]]:
    """Add the recipe's tokens to `tokenizer`, whose model has so many `embeddings`; None: there are none."""
    asked = [(field, token) for field in FIELDS for token in getattr(section, field.partition(".")[2])]
    if not asked:
        return None, []
    known = tokenizer.get_vocab()
    problems = [
        (field, f"{token!r} is a token of the model already (number {known[token]}); remove it")
        for field, token in asked
        if token in known
    ]
    if problems:
        return None, problems
    split = {token: list(tokenizer(token, add_special_tokens=False).input_ids) for _, token in asked}
    for field_name, token in asked:
        special = field_name == FIELDS[1]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)], special_tokens=special)
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for _, token in asked}
    problems = list(_problems(asked, split, ids, config, tokenizer, embeddings))
    last = max(ids.values()) + 1
    rows = embeddings if last <= embeddings else -(-last // MULTIPLE) * MULTIPLE
    return AddedTokens(ids, {ids[token]: split[token] for _, token in asked}, rows, config), problems


def _problems(
    asked: list[tuple[str, str]],
    split: dict[str, list[int]],
    ids: dict[str, int],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    embeddings: int,
) -> Iterator[Problem]:
    taken = {value: name for name, value in _numbered(config)}
    for name, token in asked:
        number, pieces = ids[token], split[token]
        if tokenizer(token, add_special_tokens=False).input_ids != [number]:
            yield name, f"{token!r} is not read as one token, since the tokenizer finds another one in it; remove that"
        elif number in taken:
            yield (
                name,
                f"{token!r} would be number {number}, the model's {taken[number]}; add that token before it",
            )
        elif not pieces or max(pieces) >= embeddings:
            yield name, f"{token!r} is made of no tokens that the model knows, so its row has nothing to start from"


def _numbered(config: PretrainedConfig) -> Iterator[tuple[str, int]]:
    """Numbers of tokens that a configuration, or one within it, names."""
    for name, value in config.to_dict().items():
        inner = value if isinstance(value, dict) else {name: value}
        for own, number in inner.items():
            if str(own).endswith(("_token_id", "_token_index")) and type(number) is int:
                yield own, number
