"""How likely a model finds given tokens, and how far its predictions are from a reference model's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import kl_div, log_softmax

from qft.data.batch import by_length, pictured_inputs
from qft.data.pictures import Pictures
from qft.data.template import IGNORED
from qft.measure.statistics import Interval, change_interval

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
LEAST = 1e-7
"""Of probability: less is what rounding leaves of a sum."""


@dataclass(frozen=True)
class Passage:
    """Tokens to read, and labels that are IGNORED where a token is context only."""

    input_ids: Sequence[int]
    labels: Sequence[int]
    source: int = 0
    images: Sequence[str] = ()
    rendered: str = ""
    """Both as encoded rows have them."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Passage:
        """An encoded row."""
        return cls(row["input_ids"], row["labels"], row["source"], row["images"], row["rendered"])

    @property
    def scored(self) -> int:
        """Tokens whose likelihood is taken; the first token has no context and never counts."""
        return sum(label != IGNORED for label in self.labels[1:])


def windows(ids: Sequence[int], window: int, stride: int) -> list[Passage]:
    """Cut one long text into windows of `window` tokens, each `stride` tokens after the one before.

    Every token but the first is scored once, with at least window - stride tokens of context after the first window."""
    if not 1 <= stride <= window:
        raise ValueError("a stride is between 1 and the window")
    made: list[Passage] = []
    scored_to = 0
    for start in range(0, len(ids), stride):
        part = list(ids[start : start + window])
        known = scored_to - start
        made.append(Passage(part, [IGNORED] * known + part[known:]))
        scored_to = start + len(part)
        if scored_to == len(ids):
            break
    return made


@dataclass(frozen=True)
class Divergence:
    """Per token, over the first tokens: KL from the reference in nats, whether both favour one token, and how far the
    log probability of any is off at most, where that was measured."""

    kl: Floats
    agrees: NDArray[np.bool_]
    farthest: Floats | None = None


@dataclass(frozen=True)
class Likelihood:
    """Per sequence, in their order: sum of negative log likelihoods in nats, and scored tokens."""

    nll: Floats
    tokens: Counts
    divergence: Divergence | None = None

    def perplexity(self, rows: Counts | None = None) -> Any:
        """exp of the mean over tokens, of all sequences or of those at `rows` [..., rows]."""
        nll, tokens = (self.nll, self.tokens) if rows is None else (self.nll[rows], self.tokens[rows])
        return np.exp(np.minimum(nll.sum(-1) / tokens.sum(-1), 700.0))

    def perplexity_change(self, reference: Likelihood, *, seed: int) -> Interval:
        """Perplexity over the reference's, minus 1, with its interval; paired by sequences."""
        return change_interval(
            lambda drawn: self.perplexity(drawn) / reference.perplexity(drawn), lambda _: 1, len(self.tokens), seed=seed
        )

    def mean_kl(self, rows: Counts | None = None) -> Any:
        """Mean KL in nats over the tokens of all sequences, or of those at `rows` [..., rows]; needs every token
        compared."""
        assert self.divergence is not None
        sums = np.add.reduceat(self.divergence.kl, np.concatenate([[0], np.cumsum(self.tokens)[:-1]]))
        sums, tokens = (sums, self.tokens) if rows is None else (sums[rows], self.tokens[rows])
        return sums.sum(-1) / tokens.sum(-1)


@dataclass(frozen=True)
class Verification:
    """The held-out rows in both models, row by row."""

    before: Likelihood
    after: Likelihood
    """With the divergence from `before` of every scored token."""


def compare(
    labels: Iterable[Sequence[int]], before: Iterable[torch.Tensor], after: Iterable[torch.Tensor]
) -> Verification:
    """What two models make of the same rows: of each its `labels` [tokens], IGNORED where nothing is scored, and both
    models' logits [tokens, vocabulary] of any float dtype. Logits are asked for one row at a time."""
    sums, tokens, kl, agrees = [], [], [], []
    models = iter(before), iter(after)
    for row in labels:
        wanted = torch.tensor(row[1:])
        at = wanted != IGNORED
        # One model's logits after the other's: of both together only the scored tokens are held.
        old, new = (log_softmax(logits[: len(wanted)][at].float(), -1) for logits in map(next, models))
        place = wanted[at].to(old.device)[:, None]
        sums.append([-float(found.gather(1, place).double().sum()) for found in (old, new)])
        tokens.append(len(place))
        kl.append(kl_div(new, old, reduction="none", log_target=True).sum(-1).clamp(min=0).cpu().numpy())
        agrees.append((old.argmax(-1) == new.argmax(-1)).cpu().numpy())
    of_row, counts = np.array(sums), np.array(tokens)
    divergence = Divergence(np.concatenate(kl).astype(np.float64), np.concatenate(agrees))
    return Verification(Likelihood(of_row[:, 0], counts), Likelihood(of_row[:, 1], counts, divergence))


class LogProbs:
    """The reference's log probabilities of every token, on the disk of `folder`: float32 [tokens, vocabulary]. The file
    has no name, so that nothing of it is left however the process ends."""

    def __init__(self, folder: Path, tokens: int, vocabulary: int) -> None:
        self.tokens = tokens
        with TemporaryFile(dir=folder) as stream:
            if hasattr(os, "posix_fallocate"):  # of a disk that fills up later, the system would tell by SIGBUS
                os.posix_fallocate(stream.fileno(), 0, tokens * vocabulary * 4)
            self.values = np.memmap(stream, np.float32, "w+", shape=(tokens, vocabulary))

    def put(self, at: Counts, log_probs: torch.Tensor) -> None:
        self.values[at] = log_probs.cpu().numpy()

    def compare(self, at: Counts, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """KL(reference || model) in nats, whether the most likely token is the same, and the largest difference of a
        log probability; all [tokens]."""
        reference = torch.from_numpy(np.asarray(self.values[at])).to(log_probs.device)
        kl = kl_div(log_probs, reference, reduction="none", log_target=True).sum(-1)
        farthest = (log_probs - reference).abs().amax(-1)
        return kl.clamp(min=0), reference.argmax(-1) == log_probs.argmax(-1), farthest


def grouped_divergence(reference: NDArray[np.float32], ids: Sequence[int], log_probs: Sequence[float]) -> float:
    """KL in nats from a reference's log probabilities [vocabulary] to a model of which those of `ids` alone are known:
    all other tokens count as one, so it is a lower bound."""
    known, told = reference[list(ids)].astype(np.float64), np.array(log_probs)
    rest = [np.log(np.maximum(1 - np.exp(some).sum(), LEAST)) for some in (known, told)]
    before, after = np.append(known, rest[0]), np.append(told, rest[1])
    return float(max((np.exp(before) * (before - after)).sum(), 0.0))


def measure(
    model: Any,
    sequences: Sequence[Passage],
    *,
    batch_size: int,
    pad: int,
    pictures: Pictures | None = None,
    write: LogProbs | None = None,
    against: LogProbs | None = None,
) -> Likelihood:
    """Read `sequences` in batches of like length, their images by `pictures`; `write` keeps the log
    probabilities, `against` compares with them.

    Right padding does not change what a causal model predicts before it, so batches change no more than rounding."""
    nll = np.zeros(len(sequences))
    tokens = np.array([sequence.scored for sequence in sequences], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(tokens)])
    store = write or against
    compared = min(store.tokens, offsets[-1]) if store else 0
    kl, agrees, farthest = np.zeros(compared), np.zeros(compared, dtype=bool), np.zeros(compared)
    for batch in by_length([len(sequence.input_ids) for sequence in sequences], batch_size):
        logits = _logits(model, [sequences[i] for i in batch], pad, pictures)
        for row, i in enumerate(batch):
            labels = torch.tensor(sequences[i].labels[1:], device=logits.device)
            at = labels != IGNORED
            log_probs = log_softmax(logits[row, : len(labels)][at].float(), dim=-1)
            nll[i] = -float(log_probs.gather(1, labels[at][:, None]).double().sum())
            places = np.arange(offsets[i], min(offsets[i + 1], compared))
            if write and len(places):
                write.put(places, log_probs[: len(places)])
            if against and len(places):
                found = against.compare(places, log_probs[: len(places)])
                kl[places], agrees[places], farthest[places] = (each.cpu().numpy() for each in found)
    return Likelihood(nll, tokens, Divergence(kl, agrees, farthest) if against else None)


def _logits(model: Any, batch: Sequence[Passage], pad: int, pictures: Pictures | None) -> torch.Tensor:
    """Logits [rows, tokens, vocabulary] of a batch padded on the right."""
    device = next(model.parameters()).device
    inputs = pictured_inputs([vars(sequence) for sequence in batch], pad, pictures, device=device)
    with torch.inference_mode():
        out = model(**inputs, use_cache=False)
    logits: torch.Tensor = out.logits
    return logits
