"""manifest.json of a run: what was asked, with what it was done, and how far it came."""

from collections.abc import Mapping
from typing import Any, Literal

from qft.documents.part import Bytes, DataHashes, Stored, Versions
from qft.documents.skipped import SkippedModules

Work = Literal["training", "calibration"]


class Base(Stored):
    """The weights that something was made from."""

    path: str
    """As the recipe says."""
    commit: str | None = None
    """Of a hub model; None for others."""
    sha256: dict[str, str] = {}
    """Of each file that defines the model, by its name."""
    whole: bool = False
    """Whether templates, code and tokenizer files that are no JSON are among them; older versions of qft left them
    out."""

    def changed(self, now: Mapping[str, str]) -> list[str]:
        """Names of files that `now`, the base's digests as they are, does not have as they were."""
        seen = {name for name in now if self.whole or name.endswith((".json", ".safetensors"))}
        return sorted(name for name in self.sha256.keys() | seen if self.sha256.get(name) != now.get(name))


class DevicePart(Stored):
    """The device that a model is on."""

    kind: str
    """cpu or cuda"""
    name: str
    total_bytes: Bytes
    """Memory in all: the GPU's, or the host's for a CPU."""
    bf16: bool
    tf32: bool
    capability: str | None = None
    """CUDA compute capability, as in 9.0."""


class Hardware(Stored):
    """The machine of a run."""

    device: DevicePart
    cpu: str
    threads: int
    """That torch computes with."""
    host_bytes: Bytes
    platform: str
    python: str


class PluginFile(Stored):
    """The code of quant.plugin, as it was run."""

    path: str
    sha256: str
    method: str
    """The quant_method that it registers."""


class Acceptance(Stored):
    """Files of a run that are not as it wrote them, and are meant to be so."""

    time: str
    files: list[str]


class Manifest(Stored):
    """manifest.json of a run's folder. Times are in UTC, as ISO 8601 has them."""

    schema_version: Literal[1] = 1
    kind: Literal["run"] = "run"
    work: Work | None = None
    """What the run is of; None in manifests from before it was told here."""
    status: str | None = None
    """running, complete, failed, interrupted or refused."""
    updated: str | None = None
    """When the status was last set."""
    command: list[str] = []
    started: str | None = None
    resumed_from: list[int] = []
    """Steps of the checkpoints from which a training was resumed, in their order."""
    seed: int | None = None
    versions: Versions = {}
    hardware: Hardware | None = None
    data: DataHashes = None
    plugin: PluginFile | None = None
    base: Base | None = None
    """None until the weights are on this machine."""
    error: str | None = None
    files: dict[str, str] | None = None
    """SHA-256 of each file that the run wrote, by its path in the folder. None until it is complete, and for a run of a
    qft that recorded none."""
    accepted: list[Acceptance] = []
    """What `qft report --verify --accept` recorded since."""
    skipped_modules: SkippedModules | None = None
    stages: list[str] = []
    """Steps of each of train.stages, and how they held the base."""


def is_manifest(document: Any) -> bool:
    """Whether a JSON document can be the manifest of a run, rather than another program's file of that name. Those from
    before a manifest had a kind have the rest of it."""
    if not isinstance(document, dict) or document.get("kind", "run") != "run":
        return False
    return isinstance(document.get("command"), list) and all(document.get(n) for n in ("status", "started", "versions"))
