"""One run to export: what is asked of it, what its base is, and what of it is to be merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from qft.documents.recorded import require_whole_run
from qft.errors import RecipeError, RunError
from qft.files import temporary_name
from qft.model.handover import Handover, decided
from qft.model.merge import read_adapter
from qft.model.rounded import settled
from qft.model.target import Target, parse_target
from qft.progress import View
from qft.quant.hold import Qat
from qft.quant.layer import Settled
from qft.recipe import LoadedRecipe, load
from qft.recipe.schema import MergeInto
from qft.run.folder import Run
from qft.run.lock import require_free


@dataclass(frozen=True)
class ExportOptions:
    """What the command line says; it wins over the recipe."""

    to: tuple[str, ...] = ()
    out: Path | None = None
    """Folder of the artifacts' folders. None: RUN/export."""
    merge_into: MergeInto | None = None
    gate: bool = True
    engine_python: Path | None = None
    """A Python that has vllm."""
    overwrite: bool = False
    """Replace artifacts of an earlier export."""
    overrides: tuple[str, ...] = ()
    """export.* and calibrate.* fields."""
    register: str | None = None
    """Name of the model in the registry whose next version each artifact becomes."""
    registry: Path | None = None
    push_to_hub: str | None = None
    """OWNER/NAME of the repository that the artifact is uploaded to."""
    private: bool = False
    """Of a repository that has to be made."""


@dataclass(frozen=True)
class Job(Handover):
    """One run to export; in its recipe the `export` and `calibrate` sections are as they hold now."""

    run: Run
    target: Target
    """The run as `qft eval` knows it: adapter on base, or all weights."""
    out: Path
    """Folder of the artifacts' folders."""
    scratch: Path
    """Where the targets of one export share what they make on the way; not there before."""
    view: View

    @property
    def adapter(self) -> Path | None:
        return self.target.adapter

    @cached_property
    def learnt(self) -> Settled | None:
        """What a run with quant.mode qat has learnt of layers beside their weights; None of another run. Raises
        ModelError if it is not there, or does not fit."""
        scheme = self.plan.scheme
        if not isinstance(scheme, Qat):
            return None
        folder = self.adapter or self.plan.checkpoint.folder
        return settled(folder, scheme.holds(self.weights.model)) if scheme.learns else Settled()

    def without_adapter(self) -> Target:
        return replace(self.target, adapter=None)


def load_run(folder: Path, overrides: Sequence[str]) -> LoadedRecipe:
    """The run's recipe. Raises MissingError without a run, DamagedError, RecipeError for what can no longer be set."""
    run = Run(folder)
    if not run.manifest():
        raise run.no_run()
    for text in overrides:
        if text.partition(".")[0] not in ("export", "calibrate"):
            raise RecipeError(f"--set {text}: the run is done; only export.* and calibrate.* can still be set")
    require_whole_run(folder)
    return load(run.folder / "recipe.yaml", overrides)


def find_job(folder: Path, loaded: LoadedRecipe, options: ExportOptions, view: View) -> Job:
    """What a run is to an exporter. Raises RunError if it did not complete, BusyError if it is still at work."""
    run = Run(folder)
    manifest = run.manifest()
    status = manifest.status if manifest else None
    if status != "complete":
        require_free(folder)
        raise RunError(f"{folder}: the run is {status}, not complete; finish it with `qft train --resume`")
    if run.base is None:
        raise RunError(f"{folder}: its manifest.json does not say what base it was trained on; it is damaged")
    target = parse_target(str(folder), adapter=None, data=None)
    if target.unverified:
        view.note(target.unverified)
    view.note("Reading the configuration")
    plan = target.plan()
    asked = options.merge_into or loaded.recipe.export.merge_into
    merge_into = decided(asked, plan, has_adapter=target.adapter is not None)
    if options.merge_into and not merge_into:
        raise RecipeError(f"--merge-into {asked}: has no meaning for a run whose base is not quantized")
    out = options.out or run.folder / "export"
    scratch = out / temporary_name("shared")
    adapter = partial(read_adapter, target.adapter) if target.adapter else lambda: None
    return Job(loaded, plan, adapter, asked, merge_into, run, target, out, scratch, view)
