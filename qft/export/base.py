"""What an export target is given, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qft.export.gate.facts import Facts, transformers_facts
from qft.model.merge import MergedWeights
from qft.model.target import Target
from qft.plan import ModelPlan
from qft.progress import View
from qft.recipe import LoadedRecipe
from qft.recipe.schema import ExportGate, MergeInto
from qft.run.folder import Run

__all__ = ["Exporter", "Job", "Limits", "Packages", "Read"]

Read = Callable[[str], torch.Tensor | None]
"""A weight of an artifact by its name in the model; None: it has none."""
Packages = tuple[tuple[str, str], ...]
"""Names of modules, each with the extra of qft that installs it."""


@dataclass(frozen=True)
class Limits:
    """What the gate asks of an artifact against the model as trained."""

    kl: float
    """Largest mean KL divergence of the next-token distributions, in nats."""
    top1_agreement: float
    """Smallest share of tokens at which both models find the same token most likely."""
    perplexity_increase: float
    """Largest relative increase of the perplexity."""

    def under(self, recipe: ExportGate) -> Limits:
        """The same with what the recipe gives in the place of the defaults."""
        given = {name: value for name, value in recipe if value is not None}
        return Limits(**vars(self) | given)


@dataclass(frozen=True)
class Job:
    """One run to export."""

    run: Run
    loaded: LoadedRecipe
    """The run's recipe, its `export` and `calibrate` sections as they hold now."""
    target: Target
    """The run as `qft eval` knows it: adapter on base, or all weights."""
    plan: ModelPlan
    """Of the base as it was trained on, or of the full model."""
    merge_into: MergeInto | None
    """None: there is no adapter, or its base is not quantized. `run.for_target` decides it."""
    view: View
    scratch: Path | None = None
    """Where targets of one call share what they make on the way; gone afterwards."""

    @property
    def adapter(self) -> Path | None:
        return self.target.adapter

    def without_adapter(self) -> Target:
        return replace(self.target, adapter=None)

    @cached_property
    def weights(self) -> MergedWeights:
        """What of the merged model is known without reading its base. Raises ModelError for what cannot be merged."""
        return MergedWeights(self.plan, self.adapter, self.dtype, self.merge_into)

    @property
    def dtype(self) -> str:
        """In which the run multiplied its weights."""
        computed = self.plan.quantization.get("bnb_4bit_compute_dtype", self.plan.dtype)
        return str(computed)


@dataclass(frozen=True)
class Exporter:
    """One export target."""

    write: Callable[[Job, Path], dict[str, Any] | None]
    """Write the artifact into an empty folder. Says how a second quantization went, if there was one. Raises
    ModelError or RecipeError for what it cannot write."""
    needed_bytes: Callable[[Job], int]
    """Room on the disk that writing takes, temporary files included."""
    load: Callable[[Job, Path], Any]
    """The artifact, loaded from its folder by its engine and ready to evaluate."""
    engine: str
    merges: bool
    """Whether the adapter is added to weights."""
    regrids: bool
    """Whether weights are rounded to the 4-bit grid that a 4-bit base came from: a small delta on top of it is lost."""
    limits: Limits
    """Where the base's weights are those that the adapter was trained against."""
    limits_original: Limits
    """Where the adapter was added to the original weights, which it has not seen."""
    library: str
    """library_name of the Hub."""
    usage: str
    """How to load it, in Markdown."""
    facts: Callable[[Any, Job, Path, Sequence[str]], Facts] = transformers_facts
    """What the loaded artifact is, of the model, the job, the folder and texts to tokenize."""
    needs: Packages = ()
    """What writing it takes beside qft's own dependencies."""
    gate_needs: Packages = ()
    """What loading it again takes besides."""
    reader: Callable[[Job, Path], Read] | None = None
    """The artifact's weights, for the gate to name the worst. None: they cannot be compared with those of the merge."""
