"""What pages tell of rows: sources, findings, and single rows token by token."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

from qft.documents.plan import DataPart
from qft.documents.rows import ShownRow, ShownToken
from qft.views.html.chart import Cell, Table
from qft.views.html.training_pictures import lengths
from qft.views.words import CONTROLS, count, percent, si

MOST = 2000
"""Tokens of a row that are shown."""


class Run(NamedTuple):
    """Tokens behind each other that count the same."""

    learnt: bool
    weight: str | None
    """In the loss; None where that is 1 of what is learnt, and else nothing."""
    tokens: list[str]


class Drawn(NamedTuple):
    """A row as a page shows it."""

    place: str
    told: str
    runs: list[Run]
    left_out: int
    """Tokens behind those that are shown."""
    images: list[str]


def parts(data: DataPart) -> dict[str, Any]:
    """What a template shows of the data of a plan, by name."""
    return {
        "headline": headline(data),
        "lengths": lengths(data.lengths.histogram if data.lengths else []),
        "sources": sources(data),
        "findings": findings(data),
    }


def headline(data: DataPart) -> Iterator[tuple[str, Cell, str]]:
    """Name, figure and what is beside it."""
    train = [source for source in data.sources if source.part == "train"]
    tokens, learnt = sum(s.tokens for s in train), sum(s.supervised_tokens for s in train)
    packed = f"in {count(data.packed_rows, 'packed row')}" if data.packed_rows else "each a row of its own"
    yield "Training examples", f"{data.train_rows:,}", packed
    yield "Held out", f"{data.eval_rows:,}", "examples"
    yield "Tokens", si(tokens), "in the training files, each row once"
    yield "Learnt", percent(learnt / tokens) if tokens else None, f"{learnt:,} tokens"
    if data.lengths:
        yield "Longest row", f"{data.lengths.longest:,}", f"tokens; half have at most {data.lengths.p50:,}"
        yield "Padding", percent(data.lengths.padding_share), "of what batches compute"
    errors = sum(finding.level == "error" for finding in data.findings)
    yield "Findings", f"{len(data.findings)}", f"{errors} of them errors"


def sources(data: DataPart) -> Table:
    """A row a source, with its share of the tokens of its part."""
    head = ("Source", "Part", "Format", "Rows", "Seen", "Tokens", "Share", "Learnt", "Longest", "Skipped", "Cut")
    of_part: dict[str, float] = {}
    for each in data.sources:
        of_part[each.part] = of_part.get(each.part, 0) + each.tokens * _times(each.weight, each.part)
    rows = [
        (
            *(each.path, each.part, each.format, f"{each.rows:,}", f"{_times(each.weight, each.part):.3g}x"),
            f"{each.tokens:,}",
            percent(each.tokens * _times(each.weight, each.part) / max(of_part[each.part], 1)),
            percent(each.supervised_tokens / max(each.tokens, 1)),
            *(f"{number:,}" for number in (each.longest, each.skipped, each.truncated)),
        )
        for each in data.sources
    ]
    return Table(head, rows)


def _times(weight: float, part: str) -> float:
    """How often a source is seen in an epoch; held-out rows are, once."""
    return weight if part == "train" else 1.0


def findings(data: DataPart) -> Table:
    """Findings, the errors first as they come, and what nobody reads."""
    rows: list[tuple[str, ...]]
    rows = [(each.name, each.level, each.text, "\n".join(each.places), each.remedy) for each in data.findings]
    for source in data.sources:
        unread = ", ".join(f"{name} ({count(rows, 'row')})" for name, rows in source.unread.items())
        remedy = "data.ignore_fields says that it is meant"
        rows += [("unread fields", "note", f"nobody reads {unread}", source.path, remedy)] if unread else []
    return Table(("Finding", "Level", "What", "Where", "Remedy"), rows)


def drawn(row: ShownRow) -> Drawn:
    """Its first tokens, in runs."""
    shown, learnt = row.pieces[:MOST], sum(token.learnt for token in row.pieces)
    runs = [
        Run(learns, weight, [token.text.translate(CONTROLS).replace("\n", "\u21b5\n") for token in tokens])
        for (learns, weight), tokens in groupby(shown, _counts)
    ]
    told = f"{count(len(row.pieces), 'token')}, {learnt:,} learnt"
    return Drawn(row.place, told, runs, len(row.pieces) - len(shown), row.images)


def _counts(token: ShownToken) -> tuple[bool, str | None]:
    usual = token.weight is None or token.weight == token.learnt
    return token.learnt, None if usual else f"{token.weight:g}"
