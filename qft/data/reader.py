"""Raw rows of a source -> examples: tokens and labels, or the reason why a row cannot be used."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
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
from qft.data.sources import JSON_COLUMN, BadRow, Rows, decode
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

LEARNT_BY = ("loss_on", "train_on_eos", "prompt_loss_weight")
"""Fields of `data` that say what is learnt."""
SEEN = 100
"""Rows of a source that are looked at to tell their format."""


@dataclass
class RowReader:
    """Raw rows of one source -> examples as records of FEATURES; a row that cannot be used has one, with the reason."""

    encoder: Encoder
    format: str
    ignored: frozenset[str]
    source: int
    folder: Path | None = None
    """Of its file."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """What the format calls fields of other names."""
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
            conversation = FORMATS[self.format](renamed(without_fields(fields, self.ignored), self.columns))
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
        "weights": encoded.weights,
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


def renamed(fields: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row whose fields are called as `columns` say. Raises BadRow for two of one name."""
    made = dict[str, Any]()
    for name, value in fields.items():
        if columns.get(name, name) in made:
            text = f"{name}: two fields are {columns.get(name, name)} by the source's columns"
            raise BadRow(f"{text}; name the other in data.ignore_fields")
        made[columns.get(name, name)] = value
    return made


def encoder_of(data: DataSection, tokenizer: PreTrainedTokenizerBase, pictures: Pictures | None = None) -> Encoder:
    """As the recipe has it."""
    assert data.max_length != "auto"  # the plan has decided
    learnt = {name: getattr(data, name) for name in LEARNT_BY}
    return Encoder(
        tokenizer, data.max_length, data.on_too_long, template_file=data.chat_template, pictures=pictures, **learnt
    )


def reader_of(data: DataSection, encoder: Encoder, rows: Rows, number: int) -> RowReader:
    """Of the source of that number. Raises DataError if nobody can tell its format."""
    path = Path(rows.source.path)
    folder = path.parent if path.is_absolute() else None
    ignored, columns = frozenset(data.ignore_fields), dict(rows.source.columns)
    return RowReader(encoder, find_format(rows, data), ignored, number, folder, columns)


def stopping(data: DataSection) -> tuple[str, ...]:
    """Of rows that cannot be used, the kinds that stop a run."""
    policies = (("bad", data.on_bad_row), ("too long", data.on_too_long))
    return tuple(kind for kind, policy in policies if policy == "stop")


def find_format(rows: Rows, data: DataSection) -> str:
    """Name of the format of a source's rows. Raises DataError if it cannot be told."""
    name: str = rows.source.format if rows.source.format != "auto" else data.format
    _require_columns(rows)
    return name if name != "auto" else _detect(rows, frozenset(data.ignore_fields))


def _require_columns(rows: Rows) -> None:
    """Raise DataError if one that the source renames is in none of its first rows."""
    columns = dict(rows.source.columns)
    for row in islice(rows.dataset, SEEN if columns else 0):
        with suppress(BadRow):
            columns = {name: new for name, new in columns.items() if name not in (decode(row) or {})}
    if columns:
        raise DataError(
            f"{rows.source.path}: none of its first {SEEN} rows has a field {next(iter(columns))} to rename"
        )


def _detect(rows: Rows, ignored: frozenset[str]) -> str:
    """Format of the first row that can be read at all."""
    unreadable = []
    for index, row in enumerate(islice(rows.dataset, SEEN)):
        try:
            fields = decode(row)
        except BadRow as error:
            unreadable.append(f"{rows.place(index)}: {error}")
            continue
        if fields is not None:
            try:
                return detect(renamed(without_fields(fields, ignored), dict(rows.source.columns)))
            except BadRow as error:
                raise DataError(f"{rows.place(index)}: {error}") from None
    first = unreadable[0] if unreadable else f"{rows.place(0)}: blank"
    more = " JSON lines have one row a line" if JSON_COLUMN in rows.dataset.column_names else ""
    raise DataError(f"{first}; nor can any of the next rows be read: is this the right file?{more}")
