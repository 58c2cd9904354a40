"""Raw rows of a source -> examples: tokens and labels, or the reason why a row cannot be used."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from qft.data.conversation import without_fields
from qft.data.encoded import COLUMNS
from qft.data.formats import FORMATS, detect
from qft.data.images import reference
from qft.data.look import Look, digest, said, sketches
from qft.data.pictures import Pictures
from qft.data.sources import BadRow, Rows, decode
from qft.data.template import IGNORED, Encoded, Encoder, TooLong
from qft.errors import DataError
from qft.recipe.data import DataSection

LOOKED = Features({"findings": List(Value("string")), "digest": Value("int64"), "sketch": Value("binary")})
"""Of rows that are used, in their last example, what qft.data.look has of them."""
FEATURES = Features(
    {
        **COLUMNS,
        "image_digest": Value("string"),
        "status": Value("string"),
        "reason": Value("string"),
        "unread": List(Value("string")),
        **LOOKED,
    }
)
"""COLUMNS; image_digest: SHA-256 of those of the images' files, empty without any; status: ok, truncated, blank, bad or
too long; the reason of the last two; fields that nobody reads; and LOOKED."""


@dataclass
class RowReader:
    """Raw rows of one source -> examples as records of FEATURES; a row that cannot be used has one, with the reason."""

    encoder: Encoder
    format: str
    ignored: frozenset[str]
    source: int
    folder: Path | None = None
    """Of its file."""
    look: Look = field(init=False)

    def __post_init__(self) -> None:
        self.look = Look(self.encoder.tokenizer)

    def __call__(
        self, batch: dict[str, list[Any]], positions: list[int], indices: Sequence[int]
    ) -> dict[str, list[Any]]:
        """Examples of the raw rows of `batch`, which are at `positions` of `indices`; by the columns of FEATURES."""
        rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        made = [
            {**record, "source": self.source, "row": indices[position]}
            for row, position in zip(rows, positions, strict=True)
            for record in self._records(row)
        ]
        for record, one in zip(made, sketches([record["sketch"] for record in made]), strict=True):
            record["sketch"] = one
        return {name: [record[name] for record in made] for name in FEATURES}

    def _records(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Those of one row, with what it says in the place of its sketch."""
        try:
            fields = decode(row)
            if fields is None:
                return [_record(Encoded([], []), "blank")]
            conversation = FORMATS[self.format](without_fields(fields, self.ignored))
            images = tuple(reference(each, self.folder) for each in conversation.images)
            examples = self.encoder(replace(conversation, images=images))
        except BadRow as error:
            return [_record(Encoded([], []), "too long" if isinstance(error, TooLong) else "bad", str(error))]
        except RecursionError:
            return [_record(Encoded([], []), "bad", "nested too deeply")]
        unread = sorted(conversation.unread)
        made = [_record(each, "truncated" if each.truncated else "ok", unread=unread) for each in examples]
        made[-1] |= {
            "findings": self.look.findings(conversation, examples),
            "digest": digest(conversation),
            "sketch": said(conversation),
        }
        return made


def _record(encoded: Encoded, status: str, reason: str = "", unread: Sequence[str] = ()) -> dict[str, Any]:
    """All of FEATURES but the place."""
    return {
        "input_ids": encoded.input_ids,
        "labels": encoded.labels,
        "length": len(encoded.input_ids),
        "supervised": sum(label != IGNORED for label in encoded.labels[1:]),
        "answer_start": encoded.answer_start,
        "images": encoded.images,
        "rendered": encoded.rendered,
        "image_digest": encoded.image_digest,
        "status": status,
        "reason": reason,
        "unread": unread,
        "findings": [],
        "digest": 0,
        "sketch": "",
    }


def encoder_of(data: DataSection, tokenizer: PreTrainedTokenizerBase, pictures: Pictures | None = None) -> Encoder:
    """As the recipe has it."""
    assert data.max_length != "auto"  # the plan has decided
    return Encoder(tokenizer, data.max_length, data.on_too_long, data.loss_on, data.chat_template, pictures)


def reader_of(data: DataSection, encoder: Encoder, rows: Rows, number: int) -> RowReader:
    """Of the source of that number. Raises DataError if nobody can tell its format."""
    path = Path(rows.source.path)
    folder = path.parent if path.is_absolute() else None
    return RowReader(encoder, find_format(rows, data), frozenset(data.ignore_fields), number, folder)


def stopping(data: DataSection) -> tuple[str, ...]:
    """Of rows that cannot be used, the kinds that stop a run."""
    policies = (("bad", data.on_bad_row), ("too long", data.on_too_long))
    return tuple(kind for kind, policy in policies if policy == "stop")


def find_format(rows: Rows, data: DataSection) -> str:
    """Name of the format of a source's rows. Raises DataError if it cannot be told."""
    name: str = rows.source.format if rows.source.format != "auto" else data.format
    return name if name != "auto" else _detect(rows)


def _detect(rows: Rows) -> str:
    """Format of the first row that can be read at all."""
    unreadable = []
    for index, row in enumerate(islice(rows.dataset, 100)):
        try:
            fields = decode(row)
        except BadRow as error:
            unreadable.append(f"{rows.place(index)}: {error}")
            continue
        if fields is not None:
            try:
                return detect(fields)
            except BadRow as error:
                raise DataError(f"{rows.place(index)}: {error}") from None
    first = unreadable[0] if unreadable else f"{rows.place(0)}: blank"
    raise DataError(f"{first}; nor can any of the next rows be read: is this the right file?")
