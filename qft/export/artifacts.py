"""A run -> its artifacts: each is written beside its final name, put before the gate, and moved there if it passes."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from qft.disk import free_bytes, require_free_space, room
from qft.documents.export import ExportDocument, Gate
from qft.documents.recorded import SIDE
from qft.errors import GateError
from qft.export.card import model_card
from qft.export.gate.served import find_engine, is_served, judge_served, require_text
from qft.export.gate.verify import Reference, judge, reference
from qft.export.job import ExportOptions, Job, find_job, load_run
from qft.export.place import require_replaceable
from qft.export.publish.hub import Repository, find_repository, push, require_pushable, staging_folder
from qft.export.publish.registry import Registration, find_registration, register
from qft.export.targets import EXPORTERS, asked_targets
from qft.files import atomic_folder, sha256, write_json, write_text
from qft.machine.device import versions
from qft.model.handover import FORMS, require_possible
from qft.model.target import require_same_base
from qft.progress import View
from qft.run.lock import locked

UNVERIFIED = Gate(passed=None, engine=None, rows=0, tokens=0, checks=[])


def export(folder: Path, options: ExportOptions, view: View) -> list[ExportDocument]:
    """Write each target into OUT/TARGET, or OUT/TARGET.failed if the gate refuses it. What is not refused is registered
    and pushed, if that is asked.

    Raises GateError once all are done if one was refused; RecipeError, MissingError, ModelError or RunError for what
    cannot be done, most of it before any work; QftError for what was written and could not be pushed."""
    loaded = load_run(folder, options.overrides)
    names = asked_targets(loaded, options)
    loaded = find_engine(loaded, options, names)
    registration = find_registration(loaded.recipe.export, options.register, options.registry)
    require_pushable(options.push_to_hub, private=options.private, gate=options.gate, targets=names)
    job = find_job(folder, loaded, options, view)
    with locked(job.out, "qft export"):
        return _exported(job, names, registration, options)


def _exported(
    job: Job, names: Sequence[str], registration: Registration | None, options: ExportOptions
) -> list[ExportDocument]:
    if job.adapter:
        require_same_base(job.adapter, job.plan)
    jobs = {name: job.settled(FORMS[name]) for name in names}
    for name, own in jobs.items():
        require_possible(name, own)
    _require_room(job, jobs, registration, overwrite=options.overwrite)
    repository = find_repository(options.push_to_hub, private=options.private) if options.push_to_hub else None
    documents, refusals = [], []
    with _reference(job, gate=options.gate) as expected:
        if expected:
            require_text(job, expected)
        for name, own in jobs.items():
            try:
                documents.append(_handed_on(own, _export(own, name, expected), registration, repository))
            except GateError as error:
                refusals.append(str(error))
    if refusals:
        raise GateError("\n".join(refusals))
    return documents


def _require_room(job: Job, jobs: Mapping[str, Job], registration: Registration | None, *, overwrite: bool) -> None:
    """Raises RunError if something is in the way, the disk is too full or the registry of no use."""
    out = job.out
    require_replaceable(job, jobs, overwrite=overwrite)
    needed = sum(EXPORTERS[name].needed_bytes(own) for name, own in jobs.items())
    require_free_space(out, needed, "the export")
    if registration:
        registration.require_possible(out, jobs, needed)
    job.view.note(f"Needs up to {room(needed)} of the {room(free_bytes(out))} that are free")


@contextmanager
def _reference(job: Job, *, gate: bool) -> Iterator[Reference | None]:
    """What the gate compares with, and job.scratch for as long."""
    job.scratch.mkdir()
    try:
        off = "The gate is off (--no-gate): nothing will be known of what is written"
        job.view.note("Asking the model as trained" if gate else off)
        with reference(job, job.out) if gate else nullcontext() as expected:
            yield expected
    finally:
        shutil.rmtree(job.scratch, ignore_errors=True)


def _export(job: Job, name: str, expected: Reference | None) -> ExportDocument:
    """One artifact. Raises GateError if it is refused; it is then at OUT/NAME.failed, and OUT/NAME is as it was."""
    exporter, final, failed = EXPORTERS[name], job.out / name, job.out / f"{name}.failed"
    job.view.note(f"Writing {name}")
    with atomic_folder(final) as folder:
        quantization = exporter.write(job, folder)
        gate = UNVERIFIED
        if expected:
            job.view.note(f"Loading {name} again")
            gate = judge(job, name, folder, expected)
            if gate.passed and is_served(job, name):
                served = judge_served(job, name, folder, expected)
                passed = all(check.passed for check in served.checks)
                gate = gate.model_copy(update={"served": served, "passed": passed})
        told = final if gate.passed is not False else failed
        document = _document(job, name, folder, told, gate, quantization)
        write_text(folder / "README.md", model_card(job, exporter, document))
        write_json(folder / "export.json", document.model_dump(mode="json"))
        require_replaceable(job, [name], overwrite=True)  # once more: much time has passed
        job.run.require_same(job.target.manifest)
        shutil.rmtree(failed, ignore_errors=True)
        if gate.passed is False:
            os.replace(folder, failed)
            raise GateError(_refusal(gate, failed))
        shutil.rmtree(staging_folder(final), ignore_errors=True)  # its links lead to the files that are now replaced
    return document


def _handed_on(
    job: Job, document: ExportDocument, registration: Registration | None, repository: Repository | None
) -> ExportDocument:
    """Registered and pushed as asked. Each is told at once: a later target may be refused, and no table be shown."""
    if registration:
        added = register(registration, job.run, document)
        job.view.note(f"Added {document.target} as {added.name} v{added.version}")
        document = document.model_copy(update={"registered": added})
    if repository:
        job.view.note(f"Pushing {document.target} to {repository.name}")
        document = document.model_copy(update={"pushed": push(repository, document)})
    return document


def _document(
    job: Job, name: str, folder: Path, told: Path, gate: Gate, quantization: dict[str, Any] | None
) -> ExportDocument:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in SIDE)
    manifest = job.target.manifest
    assert manifest
    assert manifest.base  # the run is complete
    return ExportDocument(
        target=name,
        path=str(told),
        run=str(job.run.folder),
        passed=gate.passed,
        bytes=sum(path.stat().st_size for path in files),
        sha256={str(path.relative_to(folder)): sha256(path) for path in files},
        base=manifest.base,
        merge_into=job.merge_into if FORMS[name].merges else None,
        dtype=job.dtype,
        quantization=quantization,
        gate=gate,
        versions=versions() | EXPORTERS[name].versions(job),
    )


def _refusal(gate: Gate, failed: Path) -> str:
    missed = [f"{c.name} is {_short(c.value)}, not {_short(c.threshold)}" for c in gate.missed()]
    where = f" (farthest from what it should be: {gate.worst_weight})" if gate.worst_weight else ""
    return f"{failed}: is not the model that was trained: {'; '.join(missed)}{where}. It was left there to look at"


def _short(value: float | str | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)[:400]
