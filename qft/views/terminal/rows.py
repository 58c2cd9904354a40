"""The rows of a plan: what the sources hold, and single rows token by token."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult

from qft.documents.plan import DataPart, SourceFacts
from qft.documents.rows import ShownRow, ShownToken
from qft.views.terminal.table import Rows, Whole, bullets
from qft.views.words import CONTROLS, count

FOLDED = 4
"""Equal tokens in a row that are shown as one, in rows with images."""


def render_data(data: DataPart) -> Group:
    """What each source holds, and what of it is told otherwise or not at all."""
    rows = Rows("Data", "source", "format", "rows", "tokens", "learnt", "longest", "skipped", "cut")
    for source in data.sources:
        tokens = (source.tokens, source.supervised_tokens, source.longest)
        counts = (source.rows, *tokens, source.skipped, source.truncated)
        rows.add(_name(source), source.format, *(f"{number:,}" for number in counts))
    unforeseen = "what a tower takes while it looks at them is not in the predicted memory"
    seen = (f"{_name(s)}: {count(s.images, 'image')}; {unforeseen}" for s in data.sources if s.images)
    told = [*seen, *map(_split, filter(_is_split, data.sources))]
    told += _lengths(data)
    return Group(rows, *bullets(told), *_findings(data), *bullets(_unread(data), "yellow"))


def _lengths(data: DataPart) -> Iterator[str]:
    if lengths := data.lengths:
        shares = ", ".join(f"{name} {getattr(lengths, name):,}" for name in ("p5", "p50", "p95", "p99", "longest"))
        yield f"tokens of a row: {shares}; {lengths.padding_share:.0%} of what batches compute is padding"


def _findings(data: DataPart) -> Iterator[RenderableType]:
    for finding in data.findings:
        places = f" ({', '.join(finding.places)})" if finding.places else ""
        text = f"{finding.name}: {finding.text}{places}: {finding.remedy}"
        yield from bullets([text], "red" if finding.level == "error" else "yellow")


def _name(source: SourceFacts) -> str:
    return f"{source.part}: {Path(source.path).name}"


def _is_split(source: SourceFacts) -> bool:
    return source.examples not in (None, source.rows)


def _split(source: SourceFacts) -> str:
    """What a template costs that renders earlier turns otherwise once more follow."""
    return (
        f"{_name(source)}: {count(source.rows, 'row')} became {source.examples:,} examples, "
        "for the chat template renders earlier turns otherwise once more follow; this takes "
        f"{source.repeated_tokens:,} of the {source.tokens:,} tokens"
    )


def _unread(data: DataPart) -> Iterator[str]:
    for source in data.sources:
        if source.unread:
            fields = ", ".join(f"{name} ({count(rows, 'row')})" for name, rows in source.unread.items())
            yield f"{_name(source)}: nobody reads {fields}; data.ignore_fields says that it is meant"


def _folded(tokens: Sequence[ShownToken]) -> Iterator[ShownToken]:
    """Hundreds of tokens that stand for one image as one, with their number."""
    for token, run in groupby(tokens):
        count = len(list(run))
        if token.learnt or count < FOLDED:
            yield from [token] * count
        else:
            yield ShownToken(f"{token.text} x{count}", False)


def _weights(tokens: Sequence[ShownToken]) -> str:
    """How many tokens count what in the loss, unless that is 1 of those that are learnt."""
    counts = Counter(token.weight for token in tokens if token.weight is not None)
    told = ", ".join(f"{count(number, 'token')} of {weight:g}" for weight, number in sorted(counts.items()))
    return f"; in the loss {told} count" if told else ""


class Shown:
    """A row token by token, the learnt ones in colour; without colours between « and »."""

    def __init__(self, row: ShownRow) -> None:
        self.row = row

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        tokens = self.row.pieces
        learnt = sum(token.learnt for token in tokens)
        yield Whole(f"{self.row.place}: {count(len(tokens), 'token')}, {learnt:,} learnt{_weights(tokens)}", "bold")
        if self.row.images:
            yield Whole(f"images: {', '.join(self.row.images)}", "dim")
            tokens = list(_folded(tokens))
        text = Whole()
        for before, token in pairwise([ShownToken("", False), *tokens, ShownToken("", False)]):
            begins, ends = token.learnt and not before.learnt, before.learnt and not token.learnt
            text.append("»" if ends and not console.color_system else "")
            text.append("|" if before.text and token.text else "", "dim")
            text.append("«" if begins and not console.color_system else "")
            written = token.text.translate(CONTROLS).replace("\n", "↵\n")
            text.append(written, "bold green" if token.learnt else "")
        yield text
