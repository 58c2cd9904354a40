"""What is told of the rows of a training, beside its plan."""

from typing import Literal

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
