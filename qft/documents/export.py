"""The document of `qft export`: what was handed over, and the proof that it is the model that was trained."""

from pathlib import Path
from typing import Any, Literal

from qft.documents.manifest import Base
from qft.documents.part import Bytes, Part, Seconds, Stored, Tokens, Versions


class GateCheck(Part):
    """One comparison of the artifact, loaded again, with the model as trained."""

    name: str
    value: float | str
    threshold: float | str | None
    """What the value may be at most (kl, perplexity_increase; of a run with quant.mode qat largest_difference of a log
    probability in nats, and different_weights) or at least (top1_agreement), or must be; None: told only."""
    passed: bool


class Served(Part):
    """The verdict of the engine that will serve the artifact, in an environment of its own."""

    engine: str
    version: str
    base: str | None
    """What an adapter was put on; None: the artifact is no adapter."""
    likeliest: int
    """The engine tells the log probabilities of so many tokens beside the taught one; in kl all others count as one, so
    that it is a lower bound."""
    seconds_to_start: Seconds | None
    generated_per_second: float | None
    """Tokens, of all continuations at once."""
    checks: list[GateCheck]


class Gate(Part):
    """The verdict over an artifact."""

    passed: bool | None
    """None: the gate was switched off, and nothing is known."""
    engine: str | None
    """What loaded the artifact for the comparison."""
    rows: int
    """Rows of the recipe on which both models were asked."""
    tokens: Tokens
    """Learnt tokens of these rows, over which distributions were compared."""
    worst_weight: str | None = None
    """Where a comparison missed: the weight that is farthest from what it should be, with its signal-to-noise ratio."""
    checks: list[GateCheck]
    served: Served | None = None
    """The same comparison by the engine of export.engine_python; None: it was not asked."""

    def missed(self) -> list[GateCheck]:
        """What did not pass; what the serving engine found has its name before it."""
        served = self.served
        of_engine = served.checks if served else []
        named = [check.model_copy(update={"name": f"{served.engine}'s {check.name}"}) for check in of_engine if served]
        return [check for check in (*self.checks, *named) if not check.passed]


class Registered(Part):
    """The version of a registry, which is a folder, that an artifact was copied into."""

    name: str
    version: int
    registry: str


class Pushed(Part):
    """The commit of the hub that an artifact was uploaded by."""

    repository: str
    commit: str
    url: str


class ExportDocument(Part):
    """export.json of an artifact's folder. Bytes throughout; shares are between 0 and 1."""

    schema_version: Literal[1] = 1
    kind: Literal["export"] = "export"
    target: str
    path: str
    run: str
    passed: bool | None
    """gate.passed."""
    bytes: Bytes
    """Of all files that are listed in sha256."""
    sha256: dict[str, str]
    """Of each file but export.json and README.md, by its name within the folder."""
    base: Base
    merge_into: Literal["dequantized", "original"] | None
    """The base weights that the adapter was added to; None: nothing was merged."""
    dtype: str
    """Of the weights that are not quantized."""
    quantization: dict[str, Any] | None = None
    """How a second quantization holds the weights, and what it cost: scheme, kl (mean, in nats, from the merged model)
    and perplexity_change."""
    gate: Gate
    versions: Versions
    registered: Registered | None = None
    pushed: Pushed | None = None
    """As `registered`, told by the command alone: export.json, written first and then never changed, has null."""


class ExportMark(Stored):
    """What tells the folder of an artifact, in each format of export.json so far."""

    schema_version: Literal[1]
    kind: Literal["export"]
    target: str
    passed: bool | None
    sha256: dict[str, str]
    dtype: str | None = None
    run: str | None = None


def export_in(folder: Path) -> ExportMark | None:
    """What its export.json says; None if the folder is no artifact of `qft export`."""
    try:
        return ExportMark.model_validate_json((folder / "export.json").read_bytes())
    except (OSError, ValueError):
        return None


class LoadCheck(Part):
    """Whether one environment can load one target, told before the export."""

    target: str
    format: str
    """What the target would write."""
    engine: str | None = None
    """None: this machine has none that could read the format."""
    version: str | None = None
    device: str | None = None
    """cpu, or the compute capability. None: it was not said."""
    loads: bool | None
    """None: not known."""
    reasons: list[str]
    """Why it cannot, or why it is not known."""
    remedies: list[str]
    source: str | None = None
    """Where it is written."""
