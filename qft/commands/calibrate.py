"""`qft calibrate`: a trained model, quantized for inference, and proof of what it cost."""

import time
from pathlib import Path

import torch

from qft.calibration.accept import Acceptance, perplexity, quantizer_for
from qft.calibration.quantizer import Quantizer
from qft.calibration.source import Source
from qft.checkpoint.digest import digest
from qft.data.prepare import Prepared
from qft.documents.calibration import CalibrationRecord, CalibrationReport
from qft.documents.recorded import lies_beside_work, record_of, require_whole_run, unverified
from qft.errors import GateError, MissingError, RunError
from qft.files import remove_folder, write_json, write_text
from qft.machine.device import versions
from qft.machine.signals import Signals
from qft.memory.guard import memory_guard, smaller_calibration
from qft.memory.meter import Meter, Snapshot
from qft.model.adapter import require_fit
from qft.model.merge import MergedWeights
from qft.model.target import require_same_base
from qft.plan import CalibrationPlan, plan_calibration
from qft.progress import View
from qft.recipe import LoadedRecipe, load
from qft.recipe.catalogue import CATALOGUE
from qft.recipe.training import OF_FILES
from qft.run.claim import claimed
from qft.run.folder import Run, record_base, start_run
from qft.run.interrupted import way_on


def find_plan(loaded: LoadedRecipe, trained: Prepared | None = None) -> tuple[CalibrationPlan, Path | None]:
    """The plan, and the run whose adapter is to be merged first, where model.path names one. `trained` is the
    recipe's data section as a training has it, if it has been encoded. Raises what `plan_calibration` does, and
    ModelError for an adapter that cannot be merged."""
    path = Path(loaded.recipe.model.path)
    run = Run(path)
    if not run.manifest():
        return plan_calibration(loaded, trained=trained), None
    require_whole_run(run.folder)
    for part in (run.adapter, run.full_model):
        if record := record_of(part):
            record.require_whole(digest)
    if not run.adapter.is_dir() and not run.full_model.is_dir():
        raise MissingError(f"{path}: the run has neither an adapter nor a model; it did not complete")
    base = load(run.folder / "recipe.yaml").recipe.model
    if run.full_model.is_dir():
        whole = {"path": str(run.full_model.resolve()), "revision": None, "dequantize": False}
        base = base.having(**dict.fromkeys(OF_FILES[2:], ()), **whole)
    named = {name: getattr(base, name) for name in (*OF_FILES, "dequantize") if name != "ignore_unexpected"}
    plan = plan_calibration(loaded.having(model=named))
    if not run.adapter.is_dir():
        return plan, None
    require_fit(run.adapter, plan.model)
    MergedWeights(plan.model, run.adapter, plan.model.dtype, "original")
    return plan, path


def calibrate(loaded: LoadedRecipe, view: View, *, resume: bool = False, overwrite: bool = False) -> CalibrationReport:
    """Quantize into output_dir/model, block by block or all at once as the engine does, unless it is refused.

    Raises GateError if calibrate.accept is not met: report.json then has the figures, and no model is left. Raises
    RecipeError, MissingError, DataError, ModelError or RunError for what cannot be done, and Interrupted for a signal:
    finished blocks are kept."""
    section = loaded.recipe.calibrate
    if resume and section and CATALOGUE[section.engine].whole_model:
        raise RunError(
            f"{loaded.recipe.output_dir}: calibrate.engine {section.engine} quantizes the whole model at once, and "
            "leaves nothing to resume from; use --overwrite to start again"
        )
    signals, run = Signals(), Run(Path(loaded.recipe.output_dir))
    claim = claimed(loaded, "calibration", view, resume=resume, overwrite=overwrite)
    with signals.caught(), claim, way_on(run, resume=resume):
        return _calibrate(loaded, view, resume=resume, overwrite=overwrite)


def _calibrate(loaded: LoadedRecipe, view: View, *, resume: bool, overwrite: bool) -> CalibrationReport:
    started = time.perf_counter()
    trained = Run(Path(loaded.recipe.model.path))
    manifest = trained.manifest()
    plan, merged_run = find_plan(loaded)
    if merged_run:
        require_same_base(Run(merged_run).adapter, plan.model)
        if note := unverified(Run(merged_run).adapter):
            view.note(note)
    needed = 0 if resume else _needed_bytes(plan, merged_run)  # what is there already was needed too
    room = (needed, "the quantized model, its blocks and their activations")
    run = start_run(plan.loaded, plan.document(), room, view, resume=resume, overwrite=overwrite)
    try:
        guard = memory_guard("calibrating", smaller_calibration(plan.calibrate))
        with run.failure_noted(), guard, Meter(plan.model.device.kind) as meter:
            before = meter.settled()
            meter.restart()
            acceptance = _begin(plan, Source(plan.model, run.work, merged_run), run, view)

            def add(folder: Path) -> None:
                trained.require_same(manifest)
                _record(run, plan, acceptance.quantizer, folder)

            accepted = acceptance.write(run.full_model, add)
            report = _report(acceptance, run.full_model if accepted else None, meter, before, started)
    finally:
        if plan.engine.whole_model:
            remove_folder(run.work, lies_beside_work)
    write_json(run.report, report.model_dump(mode="json"))
    run.end("complete" if accepted else "refused", view)
    if not accepted:
        resumable = "" if plan.engine.whole_model else "; --resume then takes the blocks as they are"
        raise GateError(f"{acceptance.refusal(run.folder)}{resumable}")
    remove_folder(run.work, lies_beside_work)
    return report


def _begin(plan: CalibrationPlan, source: Source, run: Run, view: View) -> Acceptance:
    record_base(run, plan.loaded, plan.model.checkpoint.with_weights().base())
    quantizer = quantizer_for(plan, source, view)
    write_text(run.folder / "calibration.jsonl", plan.data.as_jsonl())
    return Acceptance(plan, source, quantizer, view)


def _record(run: Run, plan: CalibrationPlan, quantizer: Quantizer, folder: Path) -> None:
    """Note beside the model what it was made of."""
    manifest = run.manifest() or run.noted
    assert manifest is not None
    record = CalibrationRecord(
        base=manifest.base,
        data=manifest.data,
        versions={**versions(), **quantizer.process.versions},
        seed=plan.seed,
        plugin=manifest.plugin and manifest.plugin.model_copy(update={"path": Path(manifest.plugin.path).name}),
    )
    write_json(folder / "calibration.json", record.model_dump(mode="json"))


def _report(
    acceptance: Acceptance, result: Path | None, meter: Meter, before: Snapshot, started: float
) -> CalibrationReport:
    plan, quantizer, unquantized = acceptance.plan, acceptance.quantizer, acceptance.before
    raised = {name for name, bits in acceptance.attempts[-1].kept.items() if bits == 16}
    peak, process, seconds = meter.peak(), quantizer.process, quantizer.block_seconds
    return CalibrationReport(
        model=plan.recipe.model.path,
        device=plan.model.device.name,
        engine=plan.calibrate.engine,
        scheme=plan.scheme_facts(),
        quantized_layers=len(quantizer.quantized_layers),
        quantized_share=plan.quantized_share({*quantizer.quantized_layers} - raised),
        skipped_layers=quantizer.skipped_layers,
        calibration=plan.data.audit.model_dump() if plan.data.audit else None,
        warnings=[*plan.data.warnings, *quantizer.unreached],
        verify_rows=len(plan.data.verify),
        verify_tokens=int(unquantized.tokens.sum()),
        perplexity_before=perplexity(unquantized, plan.seed),
        scores_before=acceptance.scores_before,
        attempts=acceptance.attempts,
        checks=acceptance.checks,
        accepted=result is not None,
        bytes_before=plan.model.shape.parameters * getattr(torch, plan.model.dtype).itemsize,
        bytes_after=acceptance.attempts[-1].weight_bytes,
        layers=quantizer.errors(),
        peak_bytes=max(peak.beyond(before), process.peak_bytes),
        peak_host_bytes=max(peak.host, process.peak_host_bytes),
        block_seconds=seconds,
        # 0: a whole model does not tell it apart, and a resumed run may have quantized no block.
        tokens_per_second=_tokens(plan) * len(seconds) / (plan.model.shape.layers * sum(seconds)) if seconds else 0.0,
        wall_seconds=time.perf_counter() - started,
        seed=plan.seed,
        versions={**versions(), **quantizer.process.versions},
        result=str(result) if result else None,
    )


def _needed_bytes(plan: CalibrationPlan, merged_run: Path | None) -> int:
    """Room for the blocks, the model made of them, two sets of hidden states, and the merged model if its scores are
    asked; for engines that take the whole model its unquantized weights, and the result twice."""
    if plan.engine.whole_model:
        return plan.model.shape.parameters * 2 * 3
    quantized = sum(scheme.bits if scheme else 0 for scheme in plan.schemes.values())
    bits = quantized / max(sum(scheme is not None for scheme in plan.schemes.values()), 1)
    linears = plan.model.shape.linear_parameters
    weights = (plan.model.shape.parameters - linears) * 2 + linears * (bits + 1) / 8
    if merged_run and (plan.calibrate.accept.score_drop is not None or plan.calibrate.remedy == "distill"):
        weights += plan.model.shape.parameters
    return int(2 * weights + 2 * 2 * _tokens(plan) * plan.model.shape.hidden_size * 4)


def _tokens(plan: CalibrationPlan) -> int:
    """Of calibration and verification."""
    return sum(map(len, plan.data.windows)) + sum(len(row["input_ids"]) for row in plan.data.verify)
