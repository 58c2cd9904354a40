"""What is told of the rows of a training, beside its plan."""

from typing import Literal, NamedTuple

from pydantic import Field

from qft.documents.part import Share, Stored, Tokens


class Finding(Stored):
    """Something about the rows that is worth a look before they are learnt."""

    name: str
    """Of the field of data.audit."""
    level: Literal["error", "warn"]
    rows: int
    """That have it; 0 where it is about all."""
    places: list[str] = []
    """File and line of the first of them."""
    text: str
    remedy: str


class RowLengths(Stored):
    """Of training rows, packed ones as such."""

    p5: Tokens
    p50: Tokens
    p95: Tokens
    p99: Tokens
    longest: Tokens
    padding_share: Share
    """Of the tokens that batches of them compute, estimated."""
    histogram: list[tuple[Tokens, int]] = []
    """[longest of the bin in tokens, rows]; empty in documents from before it was told here."""


class ShownToken(NamedTuple):
    text: str
    learnt: bool
    weight: float | None = None
    """What it counts in the loss of a training; None: 1 if it is learnt, and else nothing."""


class ShownRow(Stored):
    """One row as the model reads it; one that became several examples is there several times."""

    place: str
    """File and line."""
    text: str
    learnt: list[str]
    """The spans of the text that are learnt, in their order."""
    images: list[str] = []
    """Paths, or the beginnings of data URIs, in their order."""
    pieces: list[ShownToken] = Field([], exclude=True)
    """Token by token, for views."""
