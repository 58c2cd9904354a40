"""The recipe's rows -> windows that `qft calibrate` measures a model on, and rows that verify the result.

Windows are plain token ids: rows as the chat template renders them, special tokens included, drawn, joined and cut to
one length. Verification rows are whole, with labels, and never among the windows' rows.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qft.data.pictures import Pictures
from qft.data.prepare import Prepared, prepare
from qft.documents.plan import Audit
from qft.errors import DataError
from qft.recipe import Recipe
from qft.recipe.schema import CalibrateSection

Ints = NDArray[np.int64]
Strings = NDArray[np.str_]

STRATA = 8
"""Ranges of length that rows of a source are drawn from in turn."""
SHORT_WINDOWS = 4
"""Windows to cut where the rows do not fill one: a single one would be a single sample."""
SHORTEST = 32
"""Tokens of such a window: in shorter ones most tokens have hardly any context, which is not how a model is used."""
FEW = 16
"""Windows, or verification rows, below which a warning is due: as few as AWQ (arXiv:2306.00978) shows to suffice."""
NARROW_SHARE, NARROW_TOKENS = 0.02, 1000
"""A set is narrow below both: 2% of a 50k vocabulary is a language's commonest tokens alone, and a small vocabulary
(of bytes, say) has few tokens however wide the text is."""
MANY_DUPLICATES = 0.2
"""Share of rows that say nothing new: from here on the set is noticeably smaller than it looks."""


@dataclass(frozen=True)
class CalibrationData:
    """`windows` all have one length, at most calibrate.max_length tokens; () and no audit if none are needed.
    `verify` has the columns of Prepared; every row has a token to score."""

    windows: tuple[tuple[int, ...], ...]
    verify: Dataset
    prepared: Prepared
    audit: Audit | None
    warnings: tuple[str, ...]

    def as_jsonl(self) -> str:
        """One line a window: {"window": its number from 0, "input_ids": […]}."""
        lines = ({"window": i, "input_ids": window} for i, window in enumerate(self.windows))
        return "".join(json.dumps(line) + "\n" for line in lines)


def calibration_data(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    needs_windows: bool,
    trained: Prepared | None = None,
    pictures: Pictures | None = None,
) -> CalibrationData:
    """Encode the rows of calibrate.data, or else of data.train, and draw windows and verification rows by the seed.
    `trained` is what the training has of this data section, if it has been encoded. Rows with images, which `pictures`
    reads, are left out: a model is calibrated on text.

    Raises DataError for bad rows or too few of them, MissingError without a file."""
    calibrate = recipe.calibrate or CalibrateSection()
    whole = trained if trained and not calibrate.data else _encode(recipe, tokenizer, calibrate, pictures)
    prepared, left_out = _of_text(whole)
    generator = np.random.default_rng(recipe.seed if calibrate.seed is None else calibrate.seed)
    digests = _digests(prepared.train)
    verify = _verification(prepared, digests, calibrate.verify_samples, generator, needs_windows)
    few = [f"{left_out} rows hold images, and are left out"] if left_out else []
    few += [f"{len(verify)} rows to verify on: fewer than {FEW} tell little"] if len(verify) < FEW else []
    if not needs_windows:
        return CalibrationData((), verify, prepared, None, tuple(few))
    rest = np.flatnonzero(~np.isin(digests, _digests(verify)) & ~np.isin(_places(prepared.train), _places(verify)))
    warnings = _overlap(prepared, len(rest))
    drawn = prepared.train.select(rest[_draw(prepared.train.select(rest), digests[rest], calibrate, generator)])
    rows = [ids[: calibrate.max_length] for ids in drawn["input_ids"]]
    windows = _cut(np.array([token for ids in rows for token in ids], dtype="<i4"), calibrate)
    audit = _audit(drawn, rows, windows, prepared, len(tokenizer))
    warnings += [*_warnings(audit, calibrate), *few]
    return CalibrationData(tuple(map(tuple, windows.tolist())), verify, prepared, audit, tuple(warnings))


def _of_text(prepared: Prepared) -> tuple[Prepared, int]:
    """The rows without images, and how many the others are. Raises DataError if none is left."""
    if not any(source.images for source in prepared.sources):
        return prepared, 0

    def without(rows: Dataset) -> Dataset:
        return rows.select(np.flatnonzero([not images for images in rows["images"]]))

    train, kept_out = without(prepared.train), without(prepared.eval) if prepared.eval else None
    if not len(train) or (kept_out is not None and not len(kept_out)):
        raise DataError("every row holds images, and a model is calibrated on text: give rows of text (calibrate.data)")
    left_out = len(prepared.train) - len(train) + len(prepared.eval or ()) - len(kept_out or ())
    return replace(prepared, train=train, eval=kept_out), left_out


def _encode(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, calibrate: CalibrateSection, pictures: Pictures | None
) -> Prepared:
    """Rows are cut to calibrate.max_length only once they are drawn for a window. Cut before, a chat whose question
    alone is longer would be refused for having nothing to learn, and a verification row would lose its answer."""
    data, seed = recipe.data, recipe.seed
    if not calibrate.data:
        # As in the training, so that data.eval_fraction holds the same rows out.
        policy = "skip" if data.on_too_long == "skip" else "truncate"
        return prepare(data.having(on_too_long=policy), tokenizer, seed, pictures)
    assert data.max_length != "auto"  # the plan has decided
    # One token more than a window takes tells a row that is cut from one that just fits.
    longest = max(data.max_length, calibrate.max_length + 1)
    changed = data.having(train=calibrate.data, on_too_long="truncate", max_length=longest)
    try:
        return prepare(changed, tokenizer, seed, pictures)
    except DataError as error:
        raise DataError(re.sub(r"^data\.train:", "calibrate.data:", str(error))) from None


def _digests(rows: Dataset) -> Strings:
    """A name for each row's token ids, equal for equal ids."""
    return np.array([hashlib.sha256(np.array(ids, dtype="<i4").tobytes()).hexdigest() for ids in rows["input_ids"]])


def _places(rows: Dataset) -> Strings:
    """A name for where each example stands, equal for those of one row."""
    return np.array([f"{source}:{row}" for source, row in zip(rows["source"], rows["row"], strict=True)])


def _verification(
    prepared: Prepared, digests: Strings, samples: int, generator: np.random.Generator, needs_windows: bool
) -> Dataset:
    """At most `samples` rows, in the order of the file: of those held out, else distinct ones of the calibration's."""
    if prepared.eval is not None:
        return prepared.eval.select(np.sort(generator.permutation(len(prepared.eval))[:samples]))
    distinct = np.sort(np.unique(digests, return_index=True)[1])
    # Half at most: a set of few rows must still calibrate.
    room = len(distinct) // 2 if needs_windows else len(distinct)
    if not room:
        raise DataError("there is one distinct row, which cannot both calibrate and verify: add rows, or set data.eval")
    return prepared.train.select(np.sort(generator.permutation(distinct)[: min(samples, room)]))


def _overlap(prepared: Prepared, left: int) -> list[str]:
    """A warning if held-out rows were among the calibration's and are left out of it. DataError if none is left."""
    if not left:
        raise DataError("every calibration row is among the held-out rows too: add rows to calibrate.data")
    left_out = len(prepared.train) - left
    if prepared.eval is None or not left_out:
        return []
    return [f"{left_out} of {len(prepared.train)} calibration rows equal a held-out row and are left out"]


def _draw(rows: Dataset, digests: Strings, calibrate: CalibrateSection, generator: np.random.Generator) -> Ints:
    """Indices of rows for all windows, shuffled: one of each source, then of each as many as its rows' share."""
    sources = np.array(rows["source"])
    lengths = np.minimum(np.array(rows["length"], dtype=np.int64), calibrate.max_length)
    repeated = np.ones(len(rows), dtype=bool)
    repeated[np.unique(digests, return_index=True)[1]] = False
    queues = []
    for number in np.unique(sources):
        # A row that is there again, by its source's weight perhaps, waits until all have been drawn once.
        parts = [np.flatnonzero((sources == number) & (repeated == again)) for again in (False, True)]
        queues.append(np.concatenate([_by_strata(part, lengths, generator) for part in parts]))
    turns = np.concatenate([np.arange(len(queue)) / len(queue) for queue in queues])
    order = np.concatenate(queues)[np.argsort(turns, kind="stable")]
    needed = calibrate.samples * calibrate.max_length
    count = int(np.searchsorted(np.cumsum(lengths[order]), needed)) + 1
    shuffled: Ints = generator.permutation(order[:count])
    return shuffled


def _by_strata(indices: Ints, lengths: Ints, generator: np.random.Generator) -> Ints:
    """`indices` in rounds that take one row of each range of length, in random order."""
    by_length = indices[np.argsort(lengths[indices], kind="stable")]
    strata = np.array_split(by_length, STRATA)
    turns = [generator.permutation(len(stratum)) + generator.random(len(stratum)) for stratum in strata]
    ordered: Ints = by_length[np.argsort(np.concatenate(turns))]
    return ordered


def _cut(ids: NDArray[np.int32], calibrate: CalibrateSection) -> NDArray[np.int32]:
    """Windows [windows, tokens] of `ids`, the rest dropped; a few short ones if `ids` do not fill one."""
    length = calibrate.max_length
    count = min(calibrate.samples, len(ids) // length)
    if not count:
        count = min(calibrate.samples, SHORT_WINDOWS)
        least = min(length, count * SHORTEST)
        length = len(ids) // count
        if len(ids) < least:
            raise DataError(
                f"the calibration set is tiny: its rows hold {len(ids)} tokens, and at least {least} are needed; add "
                f"rows to {'calibrate.data' if calibrate.data else 'data.train'}"
            )
    return ids[: count * length].reshape(count, length)


def _audit(
    drawn: Dataset, rows: list[list[int]], windows: NDArray[np.int32], prepared: Prepared, vocabulary: int
) -> Audit:
    p5, p50, p95 = (int(np.percentile([len(ids) for ids in rows], q, method="nearest")) for q in (5, 50, 95))
    numbers = Counter(drawn["source"])
    by_source: Counter[str] = Counter()
    for number, source in enumerate(prepared.sources):
        if source.part == "train":
            by_source[source.path] += numbers[number]
    distinct = len(np.unique(windows))
    return Audit(
        rows=len(rows),
        windows=windows.shape[0],
        window_tokens=windows.shape[1],
        tokens=windows.size,
        row_length_p5=p5,
        row_length_p50=p50,
        row_length_p95=p95,
        distinct_tokens=distinct,
        vocabulary_share=distinct / vocabulary,
        duplicate_rows=len(rows) - len(set(map(tuple, rows))),
        truncated_rows=sum(length > len(ids) for length, ids in zip(drawn["length"], rows, strict=True)),
        by_source=dict(by_source),
        sha256=hashlib.sha256(windows.tobytes()).hexdigest(),
    )


def _warnings(audit: Audit, calibrate: CalibrateSection) -> Iterator[str]:
    """What of the set is small or narrow, each with its number."""
    if audit.window_tokens < calibrate.max_length:
        yield (
            f"the rows do not fill one window of {calibrate.max_length} tokens: they are cut into {audit.windows} "
            f"windows of {audit.window_tokens} tokens"
        )
    elif audit.windows < calibrate.samples:
        yield f"the rows fill {audit.windows} of {calibrate.samples} windows"
    if audit.windows < FEW:
        yield f"{audit.windows} calibration windows: fewer than {FEW} tell little of what the model will read"
    if audit.vocabulary_share < NARROW_SHARE and audit.distinct_tokens < NARROW_TOKENS:
        yield (
            f"the calibration windows hold {audit.distinct_tokens} distinct tokens, {audit.vocabulary_share:.1%} of "
            "the vocabulary: the set is narrow"
        )
    if audit.duplicate_rows > MANY_DUPLICATES * audit.rows:
        yield f"{audit.duplicate_rows} of {audit.rows} calibration rows repeat another one"
