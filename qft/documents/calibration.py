"""The document of `qft calibrate`: what was quantized how, and what it cost on rows that calibrated nothing."""

from typing import Any, Literal

from qft.documents.evaluation import LayerError, Score
from qft.documents.manifest import Base, PluginFile
from qft.documents.part import Bytes, DataHashes, Nats, Part, Seconds, Share, Stored, Tokens, TokensPerSecond, Versions


class Attempt(Part):
    """One way to hold the layers, and what it cost. The first is the recipe's own; the remedy adds others."""

    kept: dict[str, int]
    """Layers that the remedy holds in more bits: bits by name."""
    distilled_steps: int = 0
    """Updates in which the quantized weights learnt from the unquantized model; 0: none."""
    weight_bytes: Bytes
    """Of all weights as written."""
    perplexity: Score
    """Of the quantized model, over the supervised tokens."""
    perplexity_change: Score
    """Perplexity over that of the unquantized model, minus 1; paired by rows."""
    kl_mean: Nats
    """Mean KL divergence of the next-token distributions from the unquantized model's."""
    kl_interval: Score
    kl_p99: Nats
    top1_agreement: Share
    """Share of tokens at which both models find the same token most likely."""
    scores: dict[str, Share] = {}
    """Task scores, by the names in eval.metrics; taken where calibrate.accept.score_drop asks for them."""


class Check(Part):
    """One of calibrate.accept."""

    name: str
    """perplexity_increase, kl or score_drop"""
    value: float
    limit: float
    passed: bool


class CalibrationReport(Part):
    """What `qft calibrate` did. Bytes, tokens and seconds throughout; shares are between 0 and 1."""

    schema_version: Literal[1] = 1
    kind: Literal["calibration"] = "calibration"
    model: str
    """As the recipe says."""
    device: str
    engine: str
    scheme: dict[str, Any]
    """data_type, bits, group_size, symmetric, activations, and the algorithm of engine llmcompressor; of engine custom
    the plugin's quantization config instead, with its quant_method."""
    quantized_layers: int
    quantized_share: Share | None = None
    """Of the weights (parameters of two dimensions or more) outside embeddings and head, by count, what the last
    attempt holds in few bits. None in documents from before it was told here."""
    skipped_layers: list[str]
    """Linear layers left in 16 bits by the recipe."""
    calibration: dict[str, Any] | None
    """The audit of the calibration windows; None if the engine looks at none."""
    warnings: list[str]
    verify_rows: int
    verify_tokens: Tokens
    perplexity_before: Score
    """Of the unquantized model, on the same rows."""
    scores_before: dict[str, Share] = {}
    attempts: list[Attempt]
    """The last one is the result."""
    checks: list[Check]
    """Of the last attempt."""
    accepted: bool
    bytes_before: Bytes
    """Of all weights in the dtype that they were computed in."""
    bytes_after: Bytes
    layers: list[LayerError]
    """Of the last attempt, on the verification rows. Empty for AWQ and SmoothQuant, which scale a layer's inputs and
    weights against each other: no layer alone is near what it was."""
    peak_bytes: Bytes
    """Largest memory, beyond what was held before: of the GPU's allocator, or of the process on a CPU. Where
    the engine has a process of its own, the larger one's."""
    peak_host_bytes: Bytes
    """Largest resident set of the process, or of the engine's own if that is larger."""
    block_seconds: list[Seconds]
    """Time of each block that this process quantized; empty with engines that take the whole model at once."""
    tokens_per_second: TokensPerSecond
    """Calibration and verification tokens times blocks, over the time of the blocks; 0 without blocks."""
    wall_seconds: Seconds
    seed: int
    versions: Versions
    result: str | None
    """Folder of the quantized model; None if it was refused."""


class CalibrationRecord(Stored):
    """calibration.json beside a quantized model: what it was made from, and by what."""

    schema_version: Literal[1] = 1
    kind: Literal["calibration-record"] = "calibration-record"
    base: Base | None
    data: DataHashes
    versions: Versions
    seed: int
    plugin: PluginFile | None = None
    """The code of quant.plugin, its path without the folders of this machine; None with other engines."""
