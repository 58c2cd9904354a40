"""Findings about all rows of a training, each with its rows, places and remedy, by the names of data.audit."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from qft.data.encoded import column
from qft.data.look import SKETCH
from qft.data.prepare import Prepared
from qft.documents.rows import Finding, RowLengths
from qft.errors import DataError
from qft.recipe.data import AuditSection

PLACES = 5
"""Of each finding that are told."""
ALIKE = 0.8
"""Share of word triples from which on two rows say almost the same."""
BANDS = 16
"""Parts of a sketch, one of which is equal in nearly all pairs that are so alike."""
FEW_LEARNT, PADDED, MANY = 0.01, 0.5, 64
"""Shares of tokens, and micro-batches' rows from which on padding is worth a word."""

TOLD = {
    "bos": (
        "begin with two BOS tokens, or without the one that the tokenizer puts before every text",
        "give a data.chat_template that writes it once (and no text that has one of its own)",
    ),
    "end_of_turn": (
        "end without a token that ends a turn learnt, so a model would not learn to stop there",
        "let the last turn be learnt (weight, train), or give a template that ends turns by a special token",
    ),
    "truncated": (
        "are cut at data.max_length, so that their answers end without an end",
        "raise data.max_length, or set data.on_too_long: skip",
    ),
    "special_tokens": (
        "have a special token in a text that the assistant did not write, which a model takes for what the template "
        "writes itself",
        "remove it from the text",
    ),
    "roles": ("have two turns of one role behind each other", "join them, or split the row"),
    "empty_turns": ("have a turn that says nothing", "fill it, or remove the row"),
    "control_characters": (
        "have control characters, or the mark that stands for bytes which were not UTF-8",
        "write the file anew from its source, as UTF-8",
    ),
    "secrets": ("have what looks like a secret, which a model would learn to tell", "remove it, and revoke it"),
    "duplicates": ("say what an earlier one says", "remove them, or say by data.train's weight how often rows count"),
    "near_duplicates": ("say almost what an earlier one says", "keep one of each"),
    "overlap": (
        "are held out and, word for word or almost, among the training rows too: what is measured on them is memory",
        "remove them from one of the two",
    ),
}
"""What rows with a finding do, and the remedy."""

Ints = NDArray[np.int64]


def audit(prepared: Prepared, levels: AuditSection) -> list[Finding]:
    """What is not off, the errors first."""
    found = [*_of_rows(prepared), *_of_sources(prepared)]
    return by_level(found, levels)


def by_level(found: Sequence[Finding], levels: AuditSection) -> list[Finding]:
    """Those that are not off, the errors first, each with its level."""
    asked = [(finding, getattr(levels, finding.name)) for finding in found]
    told = [finding.model_copy(update={"level": level}) for finding, level in asked if level != "off"]
    return sorted(told, key=lambda finding: finding.level != "error")


def require_sound(findings: Sequence[Finding]) -> None:
    """Raise DataError for those that are errors."""
    wrong = [finding for finding in findings if finding.level == "error"]
    if wrong:
        lines = [told(finding) for finding in wrong]
        names = ", ".join(f"{finding.name}: warn" for finding in wrong)
        raise DataError("\n".join([*lines, f"if it is meant, set data.audit: {{{names}}}"]))


def told(finding: Finding) -> str:
    """In one line."""
    places = f" ({', '.join(finding.places)}{', …' if finding.rows > len(finding.places) else ''})"
    return f"{finding.name}: {finding.text}{places if finding.places else ''}: {finding.remedy}"


def lengths_of(lengths: Ints, batch: int, *, grouped: bool, side_by_side: bool) -> RowLengths:
    """Of the rows that batches of `batch` are made of, drawn at random or `grouped` by their lengths."""
    p5, p50, p95, p99 = (int(np.percentile(lengths, q, method="nearest")) for q in (5, 50, 95, 99))
    order = np.sort(lengths) if grouped else np.random.default_rng(0).permutation(lengths)
    starts = np.arange(0, len(order), batch)
    rows = np.diff(np.append(starts, len(order)))
    computed = int((np.maximum.reduceat(order, starts) * rows).sum())
    share = 0.0 if side_by_side else 1 - int(order.sum()) / computed
    percentiles = {"p5": p5, "p50": p50, "p95": p95, "p99": p99, "longest": int(lengths.max())}
    return RowLengths(**percentiles, padding_share=share, histogram=histogram(lengths))


def histogram(lengths: Sequence[int] | Ints, bins: int = 24) -> list[tuple[int, int]]:
    """Of row lengths, in equal bins: [longest of the bin, rows]."""
    longest = int(max(lengths))
    width = max(-(-longest // bins), 1)
    counts = np.bincount((np.asarray(lengths) - 1) // width, minlength=-(-longest // width))
    return [((number + 1) * width, int(rows)) for number, rows in enumerate(counts)]


def padding_finding(lengths: RowLengths, rows: int) -> list[Finding]:
    """That most of what is computed is padding, if it is."""
    if lengths.padding_share <= PADDED or rows < MANY:
        return []
    text = f"{lengths.padding_share:.0%} of the tokens in batches are padding"
    remedy = "set data.packing: true, or train.train_sampling_strategy: group_by_length"
    return [Finding(name="padding", level="warn", rows=0, text=text, remedy=remedy)]


def _of_rows(prepared: Prepared) -> Iterator[Finding]:
    rows = prepared.looked
    sources, numbers = column(rows, "source"), column(rows, "row")
    counts: Counter[str] = Counter()
    places: defaultdict[str, list[str]] = defaultdict(list)

    def note(name: str, index: int, where: str = "") -> None:
        counts[name] += 1
        if len(places[name]) < PLACES:
            places[name].append(prepared.place(int(sources[index]), int(numbers[index])) + (where and f": {where}"))

    for index, findings in _marked(rows):
        for name, where in findings.items():
            note(name, index, where)
    for name, indices in _repeated(prepared, rows):
        for index in indices.tolist():
            note(name, index)
    for name, (what, remedy) in TOLD.items():
        if counts[name]:
            text = f"{counts[name]:,} of {len(rows):,} rows {what}"
            yield Finding(name=name, level="warn", rows=counts[name], places=places[name], text=text, remedy=remedy)


def _marked(rows: Dataset) -> Iterator[tuple[int, dict[str, str]]]:
    """Of each row that has findings, its index, and their names with where they are first."""
    lists = rows.select_columns(["findings"]).with_format("arrow")[:]["findings"]
    for index in np.flatnonzero(pc.list_value_length(lists).to_numpy()).tolist():
        found = [each.partition(" ") for each in lists[index].as_py()]
        yield index, {name: where for name, _, where in reversed(found)}


def _of_sources(prepared: Prepared) -> Iterator[Finding]:
    few = [source for source in prepared.sources if source.supervised_tokens < FEW_LEARNT * source.tokens]
    for source in few:
        share = source.supervised_tokens / source.tokens
        yield Finding(
            name="few_learnt",
            level="warn",
            rows=source.rows,
            places=[source.path],
            text=f"{share:.2%} of its tokens are learnt",
            remedy="look at it by `qft check --show 2`, and at data.loss_on and the template's markers",
        )


def _repeated(prepared: Prepared, rows: Dataset) -> Iterator[tuple[str, Ints]]:
    """Indices of rows that say again, or almost, what one before them says: within their part, then held-out rows that
    training rows say."""
    digests = column(rows, "digest")
    held = _held(prepared, rows)
    sketches, known = _sketches(rows)
    again, alike = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
    for part in (np.flatnonzero(~held), np.flatnonzero(held)):
        again[part] = _seen(digests[part]) >= 0
        alike[part] = _like_earlier(sketches[part], known[part])
    yield "duplicates", np.flatnonzero(again)
    yield "near_duplicates", np.flatnonzero(alike & ~again)
    if held.any():
        order = np.concatenate([np.flatnonzero(~held), np.flatnonzero(held)])
        first = int((~held).sum())
        same = np.isin(digests[order[first:]], digests[order[:first]])
        near = _like_earlier(sketches[order], known[order], before=first)[first:]
        yield "overlap", order[first:][same | near]


def _held(prepared: Prepared, rows: Dataset) -> NDArray[np.bool_]:
    """Which rows are held out."""
    if prepared.eval is None:
        return np.zeros(len(rows), bool)
    own, others = (_keys(each) for each in (rows, prepared.eval))
    return np.isin(own, others)


def _keys(rows: Dataset) -> Ints:
    """A number for where each stands."""
    made: Ints = column(rows, "source").astype(np.int64) * 2**40 + column(rows, "row")
    return made


def _sketches(rows: Dataset) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """uint32 [rows, SKETCH], and which rows have one."""
    each = column(rows, "sketch")
    known = np.array([bool(one) for one in each], dtype=bool)
    empty = bytes(4 * SKETCH)
    flat = np.frombuffer(b"".join(one or empty for one in each), dtype="<u4")
    return flat.reshape(-1, SKETCH), known


def _seen(keys: Ints) -> Ints:
    """Of each key, the index of the first that equals it; -1: it is that itself."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    found: Ints = first[inverse.reshape(-1)]
    return np.where(found == np.arange(len(keys)), -1, found)


def _like_earlier(
    sketches: NDArray[np.uint32], known: NDArray[np.bool_], before: int | None = None
) -> NDArray[np.bool_]:
    """Whether each row is almost one of those before it; or one of the first `before` rows alone."""
    alike = np.zeros(len(sketches), bool)
    width = SKETCH // BANDS
    odd = np.random.default_rng(1).integers(1, 2**62, width, dtype=np.int64) * 2 + 1
    for start in range(0, SKETCH, width):
        keys = (sketches[:, start : start + width].astype(np.int64) * odd).sum(1)
        first = _seen(keys)
        pairs = np.flatnonzero((first >= 0) & known & ~alike & known[first])
        pairs = pairs if before is None else pairs[(pairs >= before) & (first[pairs] < before)]
        share = (sketches[pairs] == sketches[first[pairs]]).mean(1)
        alike[pairs[share >= ALIKE]] = True
    return alike
