"""What a registry holds (manifest.json of a version, history.jsonl), and what `qft models --json` prints."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from qft.documents.manifest import Base
from qft.documents.part import Bytes, DataHashes, Part, Stored


class RecipeText(Stored):
    path: str
    sha256: str
    text: str
    """YAML, as it was resolved."""


class GateFigure(Stored):
    """One comparison of the artifact with the model as trained."""

    name: str
    value: float | str | None = None
    threshold: float | str | None = None
    passed: bool | None = None


class Verdict(Stored):
    """What the gate of `qft export` found, as export.json has it."""

    passed: bool | None = None
    """None: the gate was switched off, and nothing is known."""
    engine: str | None = None
    """What loaded the artifact for the comparison."""
    checks: list[GateFigure] = []


class VersionManifest(Stored):
    """manifest.json of a version, or of the base that versions were made from (kind original), which has no files here.
    Before it is added, a version is what is known of its artifact. What nobody said is None."""

    schema_version: Literal[1] = 1
    kind: Literal["version", "original"] = "version"
    created: str = ""
    """In UTC, as ISO 8601 has it."""
    target: str | None = None
    base: Base | None = None
    data: DataHashes = None
    recipe: RecipeText | None = None
    scores: dict[str, float] | None = None
    """Of the run on its held-out rows, by name."""
    gate: Verdict | None = None
    run: str | None = None
    bytes: Bytes | None = None
    sha256: dict[str, str] | None = None
    """Of each file by its name within the artifact."""


class Event(Stored):
    """One line of history.jsonl. Its time is in UTC, as ISO 8601 has it."""

    model_config = ConfigDict(populate_by_name=True)

    time: str
    action: Literal["add", "promote", "rollback"]
    start: str | None = Field(alias="from")
    """What was current before: vN or original-HASH. None: nothing, or an add, which changes nothing of it."""
    to: str
    """The version that was added, or what is current since."""
    reason: str
    manifest_sha256: str | None = None
    """Of an add: of the version's manifest.json."""
    forced: bool = False
    """Made current although its gate did not pass, or although a base is not whole on this machine."""
    recovered: bool = False
    """Written by the command after one that was killed."""


class Finding(Part):
    """One version, or the original, beside its manifest. Paths are relative to its folder."""

    entry: str
    """vN or original-HASH."""
    missing: list[str] = []
    changed: list[str] = []
    unreadable: list[str] = []
    extra: list[str] = []
    whole: bool
    """Whether nothing is missing, changed, unreadable or extra."""

    @classmethod
    def of(cls, entry: str, **found: list[str]) -> Finding:
        return cls(entry=entry, **found, whole=not any(found.values()))

    def sentences(self) -> list[str]:
        kinds = {"missing": self.missing, "changed": self.changed, "cannot be read": self.unreadable}
        kinds["not in the manifest"] = self.extra
        return [f"{self.entry}: {name}: {kind}" for kind, names in kinds.items() for name in names]


class Difference(Part):
    """One figure or field of two versions; None where a version has none."""

    section: str
    field: str
    """Dotted within the section; empty where the section is one value."""
    a: Any
    b: Any


class ModelVersions(Part):
    current: str | None
    """vN or original-HASH; None before the first promote, or if it is damaged."""
    versions: dict[str, VersionManifest]
    """Those that can be read."""
    problems: list[str] = []
    """A sentence for each damage that is seen without hashing; none of them hides what is still good."""


class RegistryListing(Part):
    """`qft models list`."""

    registry: str
    models: dict[str, ModelVersions]


class VersionDetails(Part):
    """`qft models show`."""

    name: str
    entry: str
    current: str | None
    path: str
    manifest: VersionManifest | None
    """None if it cannot be read."""
    history: list[Event]
    """Of the model, oldest first."""
    problems: list[str] = []
    """As in `qft models list`."""


class VersionComparison(Part):
    """`qft models diff`."""

    name: str
    a: str
    b: str
    rows: list[Difference]


class VersionVerification(Part):
    """`qft models verify`."""

    name: str
    valid: bool
    entries: list[Finding]
    problems: list[str]
    """Sentences; none if it is valid."""
