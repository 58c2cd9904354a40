"""The document of `qft eval`: one entry a target, every figure of it measured on the same rows and tokens."""

from __future__ import annotations

from typing import Any, Literal

from qft.documents.part import Bits, Bytes, Decibels, Nats, Part, Seconds, Share, Tokens, TokensPerSecond, Versions


class Score(Part):
    """A figure with its 95% interval, by bootstrap over rows."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, interval: tuple[float, float, float]) -> Score:
        """Of a value with the low and the high end of its interval."""
        value, low, high = interval
        return cls(value=value, low=low, high=high)


class SourceResult(Part):
    source: str
    perplexity: float
    eval_tokens: Tokens


class LayerError(Part):
    """What quantizing did to one linear layer, against the reference's weights and activations."""

    name: str
    block: int | None
    """Index of the block; None outside the blocks."""
    kind: str
    """Name within its block: q_proj, down_proj, …"""
    weight_error: float
    """Norm of the difference of the weights, over the norm of the reference's."""
    output_snr_db: Decibels
    """Signal to noise of the layer's output on real activations; higher is better."""
    outlier_share: Share
    """Share of the input's magnitudes above six times their root mean square."""
    bytes: Bytes
    """What the layer takes as the target holds it."""


class HarnessResult(Part):
    """One metric of a task of EleutherAI's lm-evaluation-harness, as the harness takes it."""

    task: str
    version: str | None
    """The task's own; None if it has none."""
    metric: str
    """acc, word_perplexity, … Perplexities are of words or bytes; bits_per_byte is in bits."""
    filter: str | None
    """How answers were read before they were scored; None: as they are."""
    value: float | None
    """In the metric's own unit: shares are between 0 and 1. None if it is no finite number."""
    stderr: float | None
    """Standard error of value over the samples; None where the harness knows none."""
    samples: int
    """Documents that were asked."""


class Load(Part):
    """So many requests at once, of an engine that serves a model."""

    concurrent: int
    """Requests that are asked at once."""
    requests: int
    """In all."""
    tokens: Tokens
    """Written, of all answers together."""
    tokens_per_second: TokensPerSecond
    """Written, of all requests together."""
    first_token_seconds: Seconds
    """From a request to the first token of its answer; the median."""


class ServedBy(Part):
    """The engine that was asked, in a process of its own or over HTTP."""

    engine: str
    """vllm, or server for one that was named by its address."""
    version: str | None = None
    url: str | None = None
    model: str | None = None
    """As requests name it."""
    seconds_to_start: Seconds | None = None
    """Until it could be asked."""
    likeliest: int | None = None
    """Tokens that it tells the log probabilities of at each place, beside the taught one's: all others count as one in
    the divergence, which is so a lower bound."""
    loads: list[Load] = []


class TargetResult(Part):
    """What an engine of its own does not tell is None."""

    name: str
    perplexity: float | None
    """exp of the mean negative log likelihood over eval_tokens."""
    perplexity_interval: Score | None
    bits_per_byte: Bits | None
    """Negative log likelihood in bits, over the bytes of the scored text."""
    eval_tokens: Tokens
    """Tokens whose likelihood was taken."""
    kl_mean: Nats | None = None
    """Mean Kullback-Leibler divergence of the next-token distributions from the reference's."""
    kl_p99: Nats | None = None
    """Its 99th percentile over tokens."""
    top1_agreement: Share | None = None
    """Share of tokens at which this model and the reference find the same token most likely."""
    kl_tokens: Tokens = 0
    """Tokens over which the three above were taken."""
    perplexity_change: Score | None = None
    """Perplexity over the reference's, minus 1; paired by rows."""
    scores: dict[str, Score] = {}
    """Task scores, by the names in eval.metrics."""
    score_changes: dict[str, Score] = {}
    """Score minus the reference's; paired by rows."""
    by_source: list[SourceResult] = []
    harness: list[HarnessResult] = []
    prefill_tokens_per_second: TokensPerSecond | None
    """Reading a prompt."""
    decode_tokens_per_second: TokensPerSecond | None
    """Writing an answer, one row at a time."""
    served_by: ServedBy | None = None
    """None: transformers, or llama.cpp in this process."""
    peak_bytes: Bytes | None
    """Largest memory while it was evaluated, the harness aside, beyond what was held before it was loaded; of the GPU
    or the process."""
    weight_bytes: Bytes | None
    """Weights in memory, scales included."""
    disk_bytes: Bytes | None
    """Files that the target is loaded from, adapter included."""
    layers: list[LayerError] = []


class Advice(Part):
    """What to try next with a run, by what was measured of it."""

    name: Literal[
        "float16", "nf4", "skip_modules", "double_quant", "qat", "distill", "learning_rate", "clipping", "rank"
    ]
    finding: str
    """In a sentence, with its figures."""
    gain: str
    """What is to be expected, and of what."""
    figures: dict[str, float]
    """Those that both are made of."""
    recipe: dict[str, Any]
    """Lines to change: values by dotted names."""


class EvalDocument(Part):
    """What `qft eval` measured. Bytes, tokens and seconds throughout; shares are between 0 and 1."""

    schema_version: Literal[1] = 1
    kind: Literal["eval"] = "eval"
    data: list[str]
    rows: int
    window: Tokens | None
    """Tokens of a window over plain text; None where each row is scored by itself."""
    stride: Tokens | None
    """Tokens from one window to the next."""
    reference: str | None
    """Name of the target that the others are compared with."""
    device: str
    seed: int
    versions: Versions
    targets: list[TargetResult]
    advice: list[Advice] = []
    """On the run that `--advise` was asked of; what is surest first."""
    wall_seconds: Seconds
