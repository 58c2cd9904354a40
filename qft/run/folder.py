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

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from qft.errors import RunError
from qft.files import now, require_free_space, write_json, write_text
from qft.machine.device import describe, versions
from qft.plan import CalibrationPlan, ModelPlan, Plan
from qft.recipe import dump

__all__ = ["Run", "check_folder", "record_base", "start_calibration", "start_run", "step_of"]

AnyPlan = Plan | CalibrationPlan
MANIFEST = "manifest.json"

# What a resumed run may not change: the checkpoint was made by it.
FIXED = ("model", "quant", "adapter", "data", "seed")
FIXED_CALIBRATION = ("model", "data", "calibrate", "seed")
UNFIXED = ("accept", "remedy", "max_bytes")
"""Of `calibrate`: what is asked of a result once its blocks are quantized."""


@dataclass(frozen=True)
class Run:
    """One run's folder."""

    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def full_model(self) -> Path:
        return self.folder / "model"

    @property
    def initial_adapter(self) -> Path:
        return self.checkpoints / "initial-adapter"

    @property
    def events(self) -> Path:
        return self.folder / "events"

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def answers(self) -> Path:
        return self.folder / "answers"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def page(self) -> Path:
        return self.folder / "report.html"

    @property
    def report(self) -> Path:
        return self.folder / "report.json"

    def manifest(self) -> dict[str, Any]:
        """The manifest; empty if the folder is no run."""
        try:
            found = json.loads((self.folder / MANIFEST).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def newest_checkpoint(self) -> Path | None:
        """The last checkpoint that was written whole (the Trainer writes trainer_state.json last)."""
        found = [p for p in self.checkpoints.glob("checkpoint-*") if _is_whole(p)]
        return max(found, key=step_of, default=None)

    def set_status(self, status: str, **more: Any) -> None:
        """running, complete, failed or interrupted."""
        write_json(self.folder / MANIFEST, self.manifest() | {"status": status, "updated": now()} | more)

    @contextmanager
    def failure_noted(self) -> Iterator[None]:
        """Around the run's work: the manifest says how it ended, if it was cut off or failed."""
        try:
            yield
        except KeyboardInterrupt:
            self.set_status("interrupted")
            raise
        except BaseException as error:
            self.set_status("failed", error=f"{type(error).__name__}: {error}")
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


def start_run(plan: Plan, *, resume: bool, overwrite: bool) -> Run:
    """Make the run folder, or take up the one that is there. Raises RunError if it cannot be resumed or the disk
    has no room for the checkpoints."""
    run = Run(Path(plan.recipe.output_dir))
    check_folder(run.folder, resume=resume, overwrite=overwrite)
    digests = {facts.path: facts.digest for facts in plan.data.sources}
    if resume:
        _require_same(run, plan, digests, FIXED)
        _require_steps_left(run, plan)
    require_free_space(run.folder, _checkpoint_bytes(plan), "its checkpoints")
    _begin(run, plan, digests, overwrite=overwrite)
    return run


def start_calibration(plan: CalibrationPlan, needed: int, *, resume: bool, overwrite: bool) -> Run:
    """The same for a calibration, whose folder will hold `needed` bytes."""
    run = Run(Path(plan.recipe.output_dir))
    check_folder(run.folder, resume=resume, overwrite=overwrite)
    digests = {facts.path: facts.digest for facts in plan.data.prepared.sources}
    if resume:
        _require_same(run, plan, digests, FIXED_CALIBRATION)
    else:
        require_free_space(run.folder, needed, "the quantized model, its blocks and their activations")
    _begin(run, plan, digests, overwrite=overwrite)
    return run


def _begin(run: Run, plan: AnyPlan, digests: dict[str, str | None], *, overwrite: bool) -> None:
    if overwrite and run.folder.exists():
        shutil.rmtree(run.folder)
    run.folder.mkdir(parents=True, exist_ok=True)
    write_text(run.folder / "recipe.yaml", dump(plan.recipe))
    write_json(run.folder / "plan.json", plan.facts())
    run.set_status(
        "running",
        command=sys.argv,
        started=now(),
        seed=plan.recipe.seed,
        versions=versions(),
        hardware=describe(plan.model.device),
        data=digests,
        plugin=_plugin(plan),
    )


def record_base(run: Run, plan: ModelPlan) -> None:
    """Note which weights the run starts from, once they are on this machine."""
    checkpoint = plan.checkpoint
    base = {"path": checkpoint.path, "commit": checkpoint.commit, "sha256": checkpoint.digests()}
    before = run.manifest().get("base")
    if before is not None and before != base:
        raise RunError(f"{run.folder}: the base model has changed since the run began; use --overwrite to start again")
    run.set_status("running", base=base)


def _require_same(run: Run, plan: AnyPlan, digests: dict[str, str | None], fixed: tuple[str, ...]) -> None:
    before = yaml.safe_load((run.folder / "recipe.yaml").read_text("utf-8"))
    now = yaml.safe_load(dump(plan.recipe))
    for asked in (before, now):
        for name in UNFIXED:
            asked.get("calibrate", {}).pop(name, None)
    changed = [name for name in fixed if before.get(name) != now.get(name)]
    if changed:
        raise RunError(
            f"{run.folder}: {', '.join(changed)} differ from the run's own recipe.yaml: "
            "restore them, or start again with --overwrite"
        )
    if run.manifest().get("data") != digests:
        raise RunError(f"{run.folder}: the data has changed since the run began; use --overwrite to start again")
    if run.manifest().get("plugin") != _plugin(plan):
        raise RunError(f"{run.folder}: quant.plugin has changed since the run began; use --overwrite to start again")


def _plugin(plan: AnyPlan) -> dict[str, Any] | None:
    quantized = plan.quantized if isinstance(plan, CalibrationPlan) else None
    plugin = (quantized or plan.model).plugin
    return asdict(plugin) if plugin else None


def _require_steps_left(run: Run, plan: Plan) -> None:
    done = step_of(run.newest_checkpoint())
    if done >= plan.steps:
        raise RunError(f"{run.folder}: the run has made its {done} steps; there is nothing to resume")


def _checkpoint_bytes(plan: Plan) -> int:
    """Bytes of the checkpoints kept and the result: float32 weights and two moments each."""
    if plan.recipe.train.save_strategy == "no":
        return plan.model.shape.trainable_parameters * 4
    kept = (plan.recipe.train.save_total_limit or 1) + 1
    return plan.model.shape.trainable_parameters * 4 * (3 * kept + 1)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return (checkpoint / "optimizer.pt").exists() and (checkpoint / "scheduler.pt").exists()
