"""`qft train`: Recipe -> Plan -> Run -> Report."""

import time
from pathlib import Path

from qft.calibration.skip_auto import choose_skip_modules, skipped_before
from qft.commands.together import Lead, follow
from qft.data.audit import told
from qft.data.encoded import write_rows
from qft.distributed.launch import restarted
from qft.distributed.world import joined, ranks, world
from qft.documents.manifest import Manifest
from qft.documents.skipped import SkippedModules
from qft.documents.training import Report
from qft.errors import Elsewhere, OutOfMemoryError
from qft.files import write_json, write_text
from qft.machine.signals import Signals
from qft.memory.guard import smaller_training
from qft.model.handover import require_exports
from qft.plan import Plan, make_plan, with_skip_modules
from qft.plan.memory import is_open, settled
from qft.plan.model import require_device
from qft.progress import View
from qft.recipe import LoadedRecipe, load
from qft.recipe.stages import staged, stages_of
from qft.run.checkpoint import checkpoints_in
from qft.run.claim import claimed
from qft.run.folder import Run, start_run
from qft.run.interrupted import way_on
from qft.training.ranks import of_all, of_rank
from qft.training.recorder import Recorder
from qft.training.session import train_model
from qft.views.html.page import side_by_side, training_page


def train(loaded: LoadedRecipe, view: View, *, resume: bool = False, overwrite: bool = False) -> Report:
    """Train as the recipe says and write the run folder.

    Raises QftError: RunError before any work if the folder forbids it, then whatever `make_plan` and `require_exports`
    refuse, then NonFiniteError or OutOfMemoryError from the training itself, or Interrupted for a signal. The last good
    checkpoint is kept in every case. Started by torchrun or its like as one of several processes, it trains with the
    others; behind the first it writes nothing, and raises Elsewhere once there is nothing left to do or to say."""
    signals, found = Signals(), ranks()
    signals.same_within = 10.0 if found else 0.0
    kind = require_device(loaded).kind if found else "cpu"
    with signals.caught(), joined(found, kind, loaded.recipe.distributed.timeout):
        if world().first:
            return _lead(loaded, view, signals, resume=resume, overwrite=overwrite)
        follow(signals)
    raise Elsewhere(0)


def _lead(loaded: LoadedRecipe, view: View, signals: Signals, *, resume: bool, overwrite: bool) -> Report:
    """What the process does that writes, as there may be others or not."""
    run = Run(Path(loaded.recipe.output_dir))
    if restarted() and not resume:  # by the launcher, for what the run folder has of the attempt before
        resume, overwrite = bool(checkpoints_in(run.checkpoints)), not checkpoints_in(run.checkpoints)
    lead = Lead()
    claim = claimed(loaded, "training", view, resume=resume, overwrite=overwrite)
    with lead.heard(), claim, way_on(run, resume=resume):
        return _train(loaded, view, signals, lead, resume=resume, overwrite=overwrite)


def _train(loaded: LoadedRecipe, view: View, signals: Signals, lead: Lead, *, resume: bool, overwrite: bool) -> Report:
    started = time.perf_counter()
    plan, skipped = _plan(loaded, view, resume=resume)
    for stage in plan.stages:
        _require_memory(stage, view)
    room = (plan.checkpoint_bytes, "its checkpoints")
    run = start_run(plan.model.loaded, plan.document(), room, view, resume=resume, overwrite=overwrite)
    with run.failure_noted():
        if skipped:
            run.note(Manifest(status="running", skipped_modules=skipped))
        recorder = Recorder(plan, view, started, skipped)
        write_rows(run.rows, plan.data.asked())
        with lead.told(plan, run):
            result = train_model(run, recorder, signals)
        recorder.distributed = of_all(recorder, world().gather(of_rank(recorder)))
        signals.wait("the report is written, which completes the run")
        report = recorder.report(run, result)
        write_json(run.report, report.model_dump(mode="json"))
        run.end("complete", view)
    # A resumed run has no answers from before. Last: a picture must not cost a result.
    answers = {moment.capitalize(): recorder.answers.get(moment, []) for moment in ("before", "after")}
    write_text(run.page, training_page(report, side_by_side(answers, plan.data.place), plan.document().data))
    return report


def _require_memory(plan: Plan, view: View) -> None:
    """Say what was predicted if it is beyond the budget. Raises OutOfMemoryError then if nobody is to make it fit."""
    memory = plan.memory
    if memory.fits is not False or memory.predicted_peak_bytes is None:
        return
    found, budget = (f"{count / 2**30:,.2f} GiB" for count in (memory.predicted_peak_bytes, memory.budget_bytes))
    text = f"{found} of the device are predicted to be taken, and memory.budget comes to {budget}"
    if plan.span:
        text = f"in stage {plan.span.number}, {text}"
    if plan.recipe.memory.on_oom == "fail":
        helps = "; ".join(smaller_training(plan.recipe, plan.model.scheme))
        raise OutOfMemoryError(f"{text}. What helps, the most first: {helps}; or set memory.on_oom: fit")
    view.note(f"{text[0].upper()}{text[1:]}: where memory runs out, the step is made in smaller parts")


def _as_before(loaded: LoadedRecipe) -> LoadedRecipe:
    """The recipe with what the run that is resumed decided of memory where it says `auto`."""
    written, stages = Path(loaded.recipe.output_dir) / "recipe.yaml", stages_of(loaded)
    left_open = any(is_open(stage.recipe) or stage.recipe.train.optim == "auto" for stage in stages)
    if not left_open or not written.is_file():
        return loaded
    before = [stage.recipe.train for stage in stages_of(load(written))]
    # Whoever has changed the number of stages is refused later.
    same = [settled(stage, train) for stage, train in zip(stages, before, strict=False)]
    same += stages[len(same) :]
    return staged(same) if loaded.recipe.train.stages else same[0]


def _plan(loaded: LoadedRecipe, view: View, *, resume: bool) -> tuple[Plan, SkippedModules | None]:
    """The plan, and what quant.skip_modules auto came to, if it says so."""
    view.note("Reading the data and the model's configuration")
    plan = make_plan(_as_before(loaded) if resume else loaded)
    require_exports(plan)
    for finding in plan.findings:
        view.note(f"Rows: {told(finding)}")
    if plan.recipe.quant.skip_modules != "auto":
        return plan, None
    skipped = skipped_before(plan) if resume else choose_skip_modules(plan, view)
    return with_skip_modules(plan, skipped.names), skipped
