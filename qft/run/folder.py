"""The run folder: what was asked, with what it was done, and its results.

recipe.yaml      the resolved recipe
manifest.json    command, versions, hardware, seed, content hashes of data, base and plugin, status
plan.json        what was decided before anything was loaded
checkpoints/     checkpoint-N, to resume from
adapter/         the adapter in peft's layout (model/ when all weights were trained, or a calibration)
work/            what a calibration that was cut off resumes from
calibration.jsonl  the windows that it looked at
events/          TensorBoard events
eval-before.json  the held-out rows' loss and scores; and eval-after.json
rows.jsonl       the held-out rows as tokens and labels; of a run that holds none out, its first training rows
answers/         the held-out rows' answers, before and after
report.json      what was measured; written once all of the above is there
report.html      the same with pictures; one file that needs no network
"""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from qft.documents.manifest import Base, Hardware, Manifest
from qft.documents.plan import CalibrationPlanDocument, PlanDocument
from qft.errors import RunError
from qft.files import files_of, now, read_file, require_free_space, sha256, write_json, write_text
from qft.machine.device import describe, versions
from qft.recipe import Recipe, dump

MANIFEST = "manifest.json"
HASHED = (
    "recipe.yaml", "plan.json", "adapter", "model", "calibration.jsonl", "rows.jsonl", "answers", "eval-before.json",
    "eval-after.json", "report.json",
)  # fmt: skip
"""What a complete run keeps, and is read again."""

# What a resumed run may not change: the checkpoint was made by it.
FIXED = {
    "plan": ("model", "quant", "adapter", "data", "seed"),
    "calibration-plan": ("model", "data", "calibrate", "seed"),
}
"""Sections of the recipe, by the kind of the plan."""
UNFIXED = ("accept", "remedy", "max_bytes")
"""Of `calibrate`: what is asked of a result once its blocks are quantized."""

Planned = PlanDocument | CalibrationPlanDocument


class Run:
    """One run's folder, and the places in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.initial_adapter = self.checkpoints / "initial-adapter"
        self.adapter = folder / "adapter"
        self.full_model = folder / "model"
        self.events = folder / "events"
        self.rows = folder / "rows.jsonl"
        self.answers = folder / "answers"
        self.work = folder / "work"
        self.page = folder / "report.html"
        self.report = folder / "report.json"

    def manifest(self) -> Manifest | None:
        """None if the folder is no run."""
        try:
            return Manifest.model_validate_json(read_file(self.folder / MANIFEST))
        except (OSError, ValueError):
            return None

    @property
    def base(self) -> Base | None:
        """The weights that the run started from; None if they are not recorded."""
        manifest = self.manifest()
        return manifest.base if manifest else None

    def newest_checkpoint(self) -> Path | None:
        """The last checkpoint that was written whole (the Trainer writes trainer_state.json last)."""
        whole = [p for p in self.checkpoints.glob("checkpoint-*") if _is_whole(p)]
        return max(whole, key=step_of, default=None)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each file of the result and of what tells of it, by its path in the folder. Reads them."""
        files = files_of(self.folder)
        return {name: sha256(path) for name, path in files.items() if name.split("/")[0] in HASHED}

    def note(self, news: Manifest) -> None:
        """Write the fields that `news` sets into the manifest."""
        changes = {name: getattr(news, name) for name in news.model_fields_set} | {"updated": now()}
        manifest = (self.manifest() or Manifest()).model_copy(update=changes)
        write_json(self.folder / MANIFEST, manifest.model_dump(mode="json"))

    @contextmanager
    def failure_noted(self) -> Iterator[None]:
        """Around the run's work: the manifest says how it ended, if it was cut off or failed."""
        try:
            yield
        except KeyboardInterrupt:
            self.note(Manifest(status="interrupted"))
            raise
        except BaseException as error:
            self.note(Manifest(status="failed", error=f"{type(error).__name__}: {error}"))
            raise


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps made by the time of a checkpoint; 0 without one."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Whether a run may begin here, asked before any work. Raises RunError."""
    run = Run(folder)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: output_dir is a file; give a folder")
    if resume:
        if not run.manifest():
            raise RunError(f"{folder}: there is no run to resume; leave --resume away to start one")
        if run.newest_checkpoint() is None and not run.work.is_dir():
            raise RunError(f"{folder}: the run has no whole checkpoint to resume from; use --overwrite to start again")
    elif folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise RunError(f"{folder}: output_dir is not empty; use --resume, --overwrite, or another output_dir")
        if not run.manifest():
            raise RunError(f"{folder}: output_dir is not empty and not a run of qft, so it is not overwritten")


def start_run(recipe: Recipe, plan: Planned, room: tuple[int, str], *, resume: bool, overwrite: bool) -> Run:
    """Make the run folder, or take up the one that is there. Raises RunError if it cannot be resumed or the disk
    has no `room`: bytes, and what for."""
    run = Run(Path(recipe.output_dir))
    check_folder(run.folder, resume=resume, overwrite=overwrite)
    facts = Manifest(
        status="running",
        command=sys.argv,
        started=now(),
        seed=recipe.seed,
        versions=versions(),
        hardware=Hardware(device=plan.device, **describe()),
        data={source.path: source.digest for source in plan.data.sources},
        plugin=plan.quantization.plugin if plan.quantization else None,
        files=None,
        accepted=[],
    )
    if resume:
        _require_same(run, recipe, facts, FIXED[plan.kind])
        done = step_of(run.newest_checkpoint())
        if plan.kind == "plan" and done >= plan.steps:
            raise RunError(f"{run.folder}: the run has made its {done} steps; there is nothing to resume")
    require_free_space(run.folder, *room)
    if overwrite and run.folder.exists():
        shutil.rmtree(run.folder)
    run.folder.mkdir(parents=True, exist_ok=True)
    write_text(run.folder / "recipe.yaml", dump(recipe))
    write_json(run.folder / "plan.json", plan.model_dump(mode="json"))
    run.note(facts)
    return run


def record_base(run: Run, base: Base) -> None:
    """Note which weights the run starts from, once they are on this machine."""
    if run.base is not None and run.base != base:
        raise RunError(f"{run.folder}: the base model has changed since the run began; use --overwrite to start again")
    run.note(Manifest(status="running", base=base))


def _require_same(run: Run, recipe: Recipe, facts: Manifest, fixed: tuple[str, ...]) -> None:
    before = yaml.safe_load((run.folder / "recipe.yaml").read_text("utf-8"))
    now = yaml.safe_load(dump(recipe))
    for sections in (before, now):
        for name in UNFIXED:
            sections.get("calibrate", {}).pop(name, None)
    changed = [name for name in fixed if before.get(name) != now.get(name)]
    if changed:
        raise RunError(
            f"{run.folder}: {', '.join(changed)} differ from the run's own recipe.yaml: "
            "restore them, or start again with --overwrite"
        )
    manifest = run.manifest() or Manifest()
    for field, what in (("data", "the data"), ("plugin", "quant.plugin")):
        if getattr(manifest, field) != getattr(facts, field):
            raise RunError(f"{run.folder}: {what} has changed since the run began; use --overwrite to start again")


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return (checkpoint / "optimizer.pt").exists() and (checkpoint / "scheduler.pt").exists()
