"""The run folder: what was asked, with what it was done, and its results.

recipe.yaml      the resolved recipe
manifest.json    command, versions, hardware, seed, content hashes of data, base and plugin, status
plan.json        what was decided before anything was loaded
checkpoints/     checkpoint-N, to resume from, each with what had been measured by then (qft_state.json)
adapter/         the adapter in peft's layout (model/ when all weights were trained, or a calibration)
replaced-N/      an earlier run, whose place this one takes once it is complete
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
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Literal

from qft.disk import disk_failure, refusal, require_free_space
from qft.documents.manifest import Base, Hardware, Manifest, PluginFile, Work, is_manifest
from qft.documents.plan import CalibrationPlanDocument, PlanDocument, PlannedStage
from qft.documents.recorded import RESULTS, lies_beside, record_of_run
from qft.errors import BusyError, DamagedError, MissingError, QftError, RunError
from qft.files import files_of, now, read_file, sha256, write_json, write_text
from qft.machine.device import describe, versions
from qft.progress import View
from qft.recipe import LoadedRecipe, Recipe, dump, load
from qft.run.checkpoint import INITIAL, STATE, best_of, best_problem, is_over, newest_whole, step_of
from qft.run.lock import release_room, require_ours
from qft.run.replaced import MANIFEST, replacing
from qft.run.resume import ANEW, Before, Planned, compare, refuse_to_resume

PLANS: dict[Work, type[Planned]] = {"training": PlanDocument, "calibration": CalibrationPlanDocument}
HASHED = (
    "recipe.yaml", "plan.json", "adapter", "model", "calibration.jsonl", "rows.jsonl", "answers", "eval-before.json",
    "eval-after.json", "report.json",
)  # fmt: skip
"""What a complete run keeps, and is read again."""


class Run:
    """One run's folder, and the places in it."""

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        """`writes`: whether this process, of those that train together, is the one that does."""
        self.folder, self.writes = folder, writes
        self.checkpoints = folder / "checkpoints"
        self.initial_adapter = self.checkpoints / INITIAL
        self.adapter = folder / "adapter"
        self.full_model = folder / "model"
        self.events = folder / "events"
        self.rows = folder / "rows.jsonl"
        self.answers = folder / "answers"
        self.work = folder / "work"
        self.page = folder / "report.html"
        self.report = folder / "report.json"
        self.checkpoint: Path | None = None
        """From which a training goes on, once start_run has looked."""
        self.begun: dict[str, str] = {}
        """What this process wrote first, by its name."""
        self.noted: Manifest | None = None
        """The manifest as this process wrote it last."""

    def manifest(self) -> Manifest | None:
        """None if the folder is no run."""
        try:
            document = json.loads(read_file(self.folder / MANIFEST))
            return Manifest.model_validate(document) if is_manifest(document) else None
        except (OSError, ValueError):
            return None

    def require_same(self, before: Manifest | None) -> None:
        """Raise BusyError if the run is not the one any more of which `before` is the manifest: whoever reads a run
        holds no lock, and another command may put a new one in its place."""
        if self.manifest() != before:
            raise BusyError(
                f"{self.folder}: another command has changed or replaced the run while it was read; try again"
            )

    def no_run(self) -> QftError:
        """Why the folder, which has no manifest, is no run."""
        if self._planned() is None:
            return MissingError(f"{self.folder}: is no run of qft")
        ways = "put back what was written, or move the folder away"
        try:
            read_file(self.folder / MANIFEST)
        except FileNotFoundError:
            what = "is missing"
        except OSError as error:
            return RunError(refusal(error, self.folder / MANIFEST))
        else:
            what = "is damaged"
        return DamagedError(
            f"{self.folder / MANIFEST}: {what}, without which nobody can tell what the run is of; {ways}"
        )

    def kind_of_work(self) -> Work | None:
        """What the run is of: as it says itself, or by its plan if an older qft wrote it. None if it is no run."""
        manifest = self.manifest()
        return (manifest.work or self._planned()) if manifest else None

    def _planned(self) -> Work | None:
        """What plan.json is of; None if it is no plan."""
        for work, document in PLANS.items():
            with suppress(OSError, ValueError):
                document.model_validate_json((self.folder / "plan.json").read_bytes())
                return work
        return None

    @property
    def base(self) -> Base | None:
        """The weights that the run started from; None if they are not recorded."""
        manifest = self.manifest()
        return manifest.base if manifest else None

    @property
    def has_result(self) -> bool:
        """Whether all is there that a training comes to, as it was written or is meant to be."""
        there = (self.adapter.is_dir() or self.full_model.is_dir()) and self.report.exists() and self.page.exists()
        parts = [record.part(name) for name in RESULTS] if (record := record_of_run(self.folder)) else []
        return there and all(kind == "whole" for part in parts for kind in part.verdicts().values())

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each file of the result and of what tells of it, by its path in the folder. Reads them."""
        files = ((name, path, name.split("/")[0]) for name, path in files_of(self.folder).items())
        return {
            name: sha256(path)
            for name, path, top in files
            if top in HASHED and not (top in RESULTS and lies_beside(name))
        }

    def note(self, news: Manifest) -> None:
        """Write the fields that `news` sets into the manifest. Raises BusyError if the folder is another process's."""
        if not self.writes:
            return
        require_ours(self.folder)
        changes = {name: getattr(news, name) for name in news.model_fields_set} | {"updated": now()}
        self.noted = (self.manifest() or self.noted or Manifest()).model_copy(update=changes)
        write_json(self.folder / MANIFEST, self.noted.model_dump(mode="json"))

    def begin(self, facts: Manifest, recipe: Recipe, plan: Planned) -> None:
        """Write what a run begins with; the manifest first: whatever is cut off from then on leaves a run."""
        document = json.dumps(plan.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False)
        self.begun = {"recipe.yaml": dump(recipe), "plan.json": f"{document}\n"}
        self.note(facts)
        for name, text in self.begun.items():
            write_text(self.folder / name, text)

    def end(self, status: Literal["complete", "refused"], view: View) -> None:
        """Note how the run ended, and its hashes. What it began with and somebody has removed since is written again,
        and said: without that, it would be no run."""
        lost = [MANIFEST] if self.manifest() is None else []
        for name, text in self.begun.items():
            if not (self.folder / name).is_file():
                lost.append(name)
                write_text(self.folder / name, text)
        if lost:
            view.note(f"{self.folder}: somebody removed {', '.join(lost)} while the run was at work: written again")
        self.note(Manifest(status=status, files=self.hashes()))

    @contextmanager
    def failure_noted(self) -> Iterator[None]:
        """Around the run's work: the manifest says how it ended, if it was cut off or failed."""
        try:
            yield
        except KeyboardInterrupt:
            self.note(Manifest(status="interrupted"))
            raise
        except BaseException as error:
            told = disk_failure(error, self.folder) or error
            release_room(self.folder)
            with suppress(OSError):  # a disk that takes nothing at all must not hide why
                self.note(Manifest(status="failed", error=f"{type(told).__name__}: {told}"))
            raise


def start_run(
    loaded: LoadedRecipe, plan: Planned, room: tuple[int, str], view: View, *, resume: bool, overwrite: bool
) -> Run:
    """Begin a run in its folder, which is `claimed`, or take up the one that is there and say from where. Raises
    RunError if it cannot be resumed or the disk has no `room`: bytes, and what for."""
    recipe = loaded.recipe
    run = Run(Path(recipe.output_dir))
    facts = Manifest(
        work="training" if isinstance(plan, PlanDocument) else "calibration",
        status="running",
        command=sys.argv,
        started=now(),
        seed=recipe.seed,
        versions=versions(),
        hardware=Hardware(device=plan.device, **describe()),
        data={source.path: source.digest for source in plan.data.sources},
        plugin=_plugin(plan),
        stages=[f"{each.first_step} to {each.last_step}: {each.quantization.described}" for each in _stages(plan)],
        error=None,
        files=None,
        accepted=[],
    )
    if resume:
        facts = facts.model_copy(update={"resumed_from": _taken_up(run, loaded, plan, facts, view)})
    require_free_space(run.folder, *room)
    with replacing(run.folder) if overwrite else nullcontext() as earlier:
        run.begin(facts, recipe, plan)
    if earlier:
        view.note(f"The earlier run waits in {earlier} until this one is complete")
    return run


def _stages(plan: Planned) -> list[PlannedStage]:
    return plan.stages if isinstance(plan, PlanDocument) else []


def _plugin(plan: Planned) -> PluginFile | None:
    """Whose code holds the base, in any of the stages."""
    held = [plan.quantization, *(stage.quantization for stage in _stages(plan))]
    return next((each.plugin for each in held if each and each.plugin), None)


def record_base(run: Run, loaded: LoadedRecipe, base: Base) -> None:
    """Note which weights the run starts from, once they are on this machine. Raises RunError if they changed."""
    before = run.base
    names = before.changed(base.sha256) if before else []
    if before and before.commit != base.commit:
        names = names or [str(base.commit)]
    if names:
        what = f"{', '.join(names)} changed since the run began"
        refuse_to_resume(loaded, [("model.path", f"{what}; restore the model, {ANEW}")])
    run.note(Manifest(status="running", base=base))


def _taken_up(run: Run, loaded: LoadedRecipe, plan: Planned, facts: Manifest, view: View) -> list[int]:
    """The steps from which the run has been resumed, this time's the last. Raises RunError if it cannot be."""
    before = _before(run, plan)
    problems, honoured = compare(before, loaded.recipe, plan, facts)
    refuse_to_resume(loaded, problems)
    checkpoint = run.checkpoint = _checkpoint(run, view) if isinstance(plan, PlanDocument) else None
    if checkpoint and isinstance(plan, PlanDocument):
        complete = before.manifest.status == "complete" and run.has_result
        _require_work(checkpoint, loaded, plan.steps, complete=complete)
    view.note(f"Going on from {checkpoint or run.work}")
    over = tuple(
        f"train.stages.{i}." for i, stage in enumerate(_stages(plan)) if stage.last_step <= step_of(checkpoint)
    )
    for field, text in honoured:
        if not field.startswith(over):
            view.note(f"From here on, {field} is {text}")
    return [*before.manifest.resumed_from, *([step_of(checkpoint)] if checkpoint else [])]


def _checkpoint(run: Run, view: View) -> Path:
    """The newest whole one; what else there is to say of them is told. Raises RunError if there is none."""
    checkpoint, told = newest_whole(run.checkpoints)
    if checkpoint is None:
        problems = "; ".join(told) or f"{run.checkpoints} holds none"
        raise RunError(f"{run.folder}: no checkpoint is whole: {problems}. Restore what is damaged, {ANEW}")
    for text in told:
        view.note(text)
    return checkpoint


def no_checkpoint(run: Run) -> str:
    """That there is none, and what to do."""
    manifest = run.manifest()
    complete = "is complete, and holds no checkpoint from which it could go on"
    cut_off = "was cut off before it had a whole checkpoint to resume from"
    text = f"{run.folder}: the run {complete if manifest and manifest.status == 'complete' else cut_off}"
    try:
        if load(run.folder / "recipe.yaml").recipe.train.save_strategy == "no":
            text += " (train.save_strategy is no)"
    except QftError:
        pass
    if result := next((path for path in (run.adapter, run.full_model) if path.is_dir()), None):
        text += f"; {result}, to which it came, was written, and can be evaluated by `qft eval` as it is"
    return f"{text}; start anew with --overwrite"


def _before(run: Run, plan: Planned) -> Before:
    try:
        was = type(plan).model_validate_json((run.folder / "plan.json").read_bytes())
    except (OSError, ValueError):
        what = f"is no {plan.kind}" if (run.folder / "plan.json").exists() else "is missing"
        raise RunError(f"{run.folder}: its plan.json {what}; put back what was written, {ANEW}") from None
    return Before(load(run.folder / "recipe.yaml").recipe, was, run.manifest() or Manifest())


def _require_work(checkpoint: Path, loaded: LoadedRecipe, steps: int, *, complete: bool) -> None:
    """Raise RunError unless something is left to do behind the checkpoint, if only to write the result."""
    train, done = loaded.recipe.train, step_of(checkpoint)
    if done > steps:
        field = "train.max_steps" if train.max_steps > 0 else "train.num_train_epochs"
        field = "train.stages" if train.stages else field
        text = f"this asks for {steps} steps in all, and the run has made {done}; ask for as many or more, {ANEW}"
        refuse_to_resume(loaded, [(field, text)])
    if is_over(checkpoint, steps, train.early_stopping_patience) and (complete or not (checkpoint / STATE).exists()):
        why = "there is nothing to resume" if complete else f"its checkpoint has no {STATE} to make a report of"
        folder, text = checkpoint.parent.parent, "ask for more steps, or more patience, to go on"
        raise RunError(f"{folder}: the run has made its {done} steps; {why}: {text}")
    best = best_of(checkpoint)
    if train.load_best_model_at_end and best and (problem := best_problem(best)):
        refuse_to_resume(loaded, [("train.load_best_model_at_end", problem)])
