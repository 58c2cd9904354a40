"""What every target of `qft eval` is asked: passages to score, and rows to answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qft.data.encoded import EncodedRows, read_rows
from qft.data.pictures import Pictures
from qft.data.prepare import held_out, prepare
from qft.errors import DataError, MissingError, RecipeError
from qft.measure.likelihood import Passage, windows
from qft.plan import ModelPlan
from qft.plan.limits import (
    answer_problems,
    length_problem,
    require_known_tokens,
    require_special_tokens,
    unknown_token,
)
from qft.recipe import Recipe, Source
from qft.recipe.schema import EvalSection
from qft.recipe.spread import is_local

TEXT_SUFFIXES = {".txt", ".md"}


@dataclass(frozen=True)
class EvalSet:
    """The same for every target."""

    passages: list[Passage]
    sources: list[str]
    text_bytes: int
    """Bytes of the scored tokens' text."""
    answered: EncodedRows | None
    """Rows to answer."""
    windowed: bool

    def place(self, source: int, row: int) -> str:
        return self.answered.place(source, row) if self.answered else ""

    def place_of(self, number: int) -> str:
        """Where a passage is from."""
        if self.answered and not self.windowed:
            row = self.answered.rows[number]
            return self.place(row["source"], row["row"])
        return f"window {number + 1} of {self.sources[self.passages[number].source]}"

    def require_room(self, plan: ModelPlan, settings: EvalSection) -> None:
        """Raise DataError, ModelError or RecipeError if a model has no room for a token, a passage or an answer."""
        shape, tokenizer, answered = plan.shape, plan.tokenizer, self.answered
        if answered:
            require_known_tokens([answered.rows], answered.place, tokenizer, shape.embeddings)
        for passage in self.passages if self.windowed else ():
            if unknown := unknown_token(passage.input_ids, tokenizer, shape.embeddings):
                raise DataError(f"{self.sources[passage.source]}: {unknown}")
        require_special_tokens(tokenizer, shape.embeddings, generates=bool(settings.metrics))
        longest, room = max(len(passage.input_ids) for passage in self.passages), shape.position_table
        problems = [*length_problem("--window" if self.windowed else "data.max_length", longest, room)]
        if answered and settings.metrics:
            problems += answer_problems(answered.rows, settings, room)
        if problems:
            raise RecipeError(f"{plan.checkpoint.path}: {field}: {text}" for field, text in problems)


def eval_set(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str | None,
    kept: Path | None,
    window: int,
    stride: int,
    holds_rows_out: bool,
    pictures: Pictures | None = None,
) -> EvalSet:
    """The rows of `data`, or else those that the recipe holds out, which a run has `kept`. A plain text is scored in
    windows, and eval.metrics are then of the answers to the recipe's held-out rows, if `holds_rows_out`.

    Raises DataError, MissingError or RecipeError for what cannot be asked."""
    if not data or Path(data).suffix.lower() not in TEXT_SUFFIXES:
        asked = _rows_of(data, recipe, tokenizer, pictures) if data else _held_out(recipe, tokenizer, kept, pictures)
        passages = [Passage.of(row) for row in asked.rows]
        of_recipe = [source.path for source in (*recipe.data.train, *recipe.data.eval)]
        sources = [path for path, _ in asked.places.values()] if data else of_recipe
        return EvalSet(passages, sources, _text_bytes(passages, tokenizer), asked, windowed=False)
    if recipe.eval.metrics and not holds_rows_out:
        raise DataError(f"{data}: plain text has no answers to score; leave the metrics away, or name a run")
    passages = _windowed(Path(data), tokenizer, window, stride)
    answered = _held_out(recipe, tokenizer, kept, pictures) if recipe.eval.metrics else None
    return EvalSet(passages, [data], _text_bytes(passages, tokenizer), answered, windowed=True)


def _rows_of(data: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, pictures: Pictures | None) -> EncodedRows:
    """All rows of a file or of a hub dataset, encoded as the recipe says."""
    source = Source(path=str(Path(data).resolve()) if Path(data).exists() or is_local(data) else data)
    section = recipe.data.having(train=(source,), eval=(), eval_fraction=0.0)
    prepared = prepare(section, tokenizer, recipe.seed, pictures)
    return EncodedRows("train", prepared.train, prepared.places)


def _held_out(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, kept: Path | None, pictures: Pictures | None
) -> EncodedRows:
    asked = read_rows(kept) if kept else held_out(recipe.data, tokenizer, recipe.seed, pictures)
    if asked is None or asked.part != "eval":
        raise DataError("the recipe holds no rows out: set data.eval or data.eval_fraction, or give --data FILE")
    return asked


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
