"""What every target of `qft eval` is asked: passages to score, and rows to answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qft.data.prepare import Prepared, prepare
from qft.errors import DataError, MissingError, RecipeError
from qft.measure.likelihood import Passage, windows
from qft.recipe import Recipe, Source

__all__ = ["Material", "gather"]

TEXT_SUFFIXES = {".txt", ".md"}


@dataclass(frozen=True)
class Material:
    """The same for every target."""

    passages: list[Passage]
    sources: list[str]
    text_bytes: int
    """Bytes of the scored tokens' text."""
    rows: Dataset | None
    prepared: Prepared | None
    windowed: bool

    def place(self, source: int, row: int) -> str:
        return self.prepared.place(source, row) if self.prepared else ""


def gather(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str | None,
    window: int,
    stride: int,
    with_answers: bool,
    holds_rows_out: bool,
) -> Material:
    """The rows of `data`, or else those that the recipe holds out. A plain text is scored in windows, and the answers
    are then those to the recipe's held-out rows, if `holds_rows_out`.

    Raises DataError, MissingError or RecipeError for what cannot be asked."""
    if not data or Path(data).suffix.lower() not in TEXT_SUFFIXES:
        prepared, rows = _held_out(recipe, tokenizer, data)
        passages = [Passage(row["input_ids"], row["labels"], row["source"]) for row in rows]
        sources = [facts.path for facts in prepared.sources]
        return Material(passages, sources, _text_bytes(passages, tokenizer), rows, prepared, windowed=False)
    if with_answers and not holds_rows_out:
        raise DataError(f"{data}: plain text has no answers to score; leave the metrics away, or name a run")
    passages = _windowed(Path(data), tokenizer, window, stride)
    prepared_rows = _held_out(recipe, tokenizer, None) if with_answers else (None, None)
    return Material(
        passages,
        [data],
        _text_bytes(passages, tokenizer),
        rows=prepared_rows[1],
        prepared=prepared_rows[0],
        windowed=True,
    )


def _held_out(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: str | None) -> tuple[Prepared, Dataset]:
    """The rows of `data`, or those that the recipe holds out."""
    if data:
        source = Source(path=str(Path(data).resolve()) if Path(data).exists() else data)
        section = recipe.data.having(train=(source,), eval=(), eval_fraction=0.0)
        prepared = prepare(recipe.having(data=section), tokenizer)
        return prepared, prepared.train
    prepared = prepare(recipe, tokenizer)
    if prepared.eval is None:
        raise DataError("the recipe holds no rows out: set data.eval or data.eval_fraction, or give --data FILE")
    return prepared, prepared.eval


def _windowed(path: Path, tokenizer: PreTrainedTokenizerBase, window: int, stride: int) -> list[Passage]:
    if not path.is_file():
        raise MissingError(f"{path}: no such file")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
    ids = list(tokenizer(text).input_ids)
    if len(ids) < 2:
        raise DataError(f"{path}: holds no text to score")
    if not 1 <= stride <= window:
        raise RecipeError(f"--stride {stride}: is between 1 and --window, which is {window}")
    return windows(ids, window, stride)


def _text_bytes(passages: Sequence[Passage], tokenizer: Any) -> int:
    """Bytes of the text whose tokens are scored."""
    scored = [[label for label in passage.labels[1:] if label >= 0] for passage in passages]
    return sum(len(tokenizer.decode(ids).encode()) for ids in scored)
