"""A run -> its artifacts: each is written beside its final name, put before the gate, and moved there if it passes."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qft.documents.export import ExportDocument, Gate, LoadCheck
from qft.errors import GateError, MissingError, RecipeError, RunError
from qft.export.base import Exporter, Job, MergeInto
from qft.export.card import model_card
from qft.export.deploy.check import check_loads, environments, weight_format
from qft.export.gate.verify import Reference, reference, verify
from qft.export.gate.worst_weight import worst_weight
from qft.export.publish.hub import Repository, find_repository, push, require_pushable, staging_folder
from qft.export.publish.registry import Registration, find_registration, register
from qft.export.targets.adapter import ADAPTER
from qft.export.targets.gguf import GGUF
from qft.export.targets.merged import MERGED
from qft.export.targets.quantized import BNB_4BIT, BNB_8BIT, COMPRESSED
from qft.files import atomic_folder, free_bytes, require_free_space, sha256, write_json, write_text
from qft.machine.device import versions
from qft.model.target import parse_target
from qft.progress import View
from qft.recipe import LoadedRecipe, load
from qft.recipe.schema import ExportSection
from qft.registry import SIDE
from qft.run.folder import Run

__all__ = ["EXPORTERS", "ExportOptions", "check_target", "export", "find_job", "for_target", "judge"]

EXPORTERS: dict[str, Exporter] = {
    "adapter": ADAPTER,
    "merged": MERGED,
    "bnb-4bit": BNB_4BIT,
    "bnb-8bit": BNB_8BIT,
    "compressed-tensors": COMPRESSED,
    **GGUF,
}
"""By the names of export.target."""
LIMITED = ("kl", "top1_agreement", "perplexity_increase")
"""Checks that wrong weights fail."""
UNVERIFIED = Gate(passed=None, engine=None, rows=0, tokens=0, checks=[])


@dataclass(frozen=True)
class ExportOptions:
    """What the command line says; it wins over the recipe."""

    to: tuple[str, ...] = ()
    out: Path | None = None
    """Folder of the artifacts' folders. None: RUN/export."""
    merge_into: MergeInto | None = None
    gate: bool = True
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


def export(folder: Path, options: ExportOptions, view: View) -> list[ExportDocument]:
    """Write each target into OUT/TARGET, or OUT/TARGET.failed if the gate refuses it. What is not refused is registered
    and pushed, if that is asked.

    Raises GateError once all are done if one was refused; RecipeError, MissingError, ModelError or RunError for what
    cannot be done, most of it before any work; QftError for what was written and could not be pushed."""
    loaded = _load(folder, options.overrides)
    names = _targets(loaded.recipe.export, options)
    registration = find_registration(loaded.recipe.export, options.register, options.registry)
    require_pushable(options.push_to_hub, private=options.private, gate=options.gate, targets=names)
    job = find_job(folder, loaded, options, view)
    out = options.out or job.run.folder / "export"
    _require_room(job, names, out, options, registration)
    repository = find_repository(options.push_to_hub, private=options.private) if options.push_to_hub else None
    documents, refusals = [], []
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        job = replace(job, scratch=Path(stack.enter_context(TemporaryDirectory(dir=out, prefix=".merged-"))))
        expected = None
        if options.gate:
            view.note("Asking the model as trained")
            expected = stack.enter_context(reference(job, out))
        else:
            view.note("The gate is off (--no-gate): nothing will be known of what is written")
        for name in names:
            try:
                document = _export(for_target(job, name, options), name, out / name, expected)
                documents.append(_handed_on(job, document, registration, repository))
            except GateError as error:
                refusals.append(str(error))
    if refusals:
        raise GateError("\n".join(refusals))
    return documents


def check_target(folder: Path, options: ExportOptions, environment: str, view: View) -> list[LoadCheck]:
    """Whether `environment` can load what `export` would write; nothing is written or loaded.

    Raises RecipeError for an environment that makes no sense, and what `export` raises before any work."""
    asked = environments(environment)
    loaded = _load(folder, options.overrides)
    names = _targets(loaded.recipe.export, options)
    job = find_job(folder, loaded, options, view)
    return [check for name in names for check in check_loads(name, weight_format(job, name), job.dtype, asked)]


def _load(folder: Path, overrides: Sequence[str]) -> LoadedRecipe:
    run = Run(folder)
    if not run.manifest():
        raise MissingError(f"{folder}: is no run of qft")
    for text in overrides:
        if text.partition(".")[0] not in ("export", "calibrate"):
            raise RecipeError(f"--set {text}: the run is done; only export.* and calibrate.* can still be set")
    return load(run.folder / "recipe.yaml", overrides)


def _targets(section: ExportSection, options: ExportOptions) -> list[str]:
    names = list(dict.fromkeys(options.to or section.target))
    known = ", ".join(EXPORTERS)
    if not names:
        raise RecipeError(f"nothing is asked for: give --to TARGET, or set export.target in the recipe ({known})")
    for name in names:
        if name not in EXPORTERS:
            raise RecipeError(f"--to {name}: is none of {known}")
    if missing := [text for name in names for text in _missing(name, gate=options.gate)]:
        raise RecipeError(missing)
    return names


def _missing(target: str, *, gate: bool) -> Iterator[str]:
    """What to install for the target, and for its gate; imports nothing."""
    exporter = EXPORTERS[target]
    for module, extra in dict.fromkeys((*exporter.needs, *(exporter.gate_needs if gate else ()))):
        if importlib.util.find_spec(module) is None:
            yield f"--to {target}: needs {module.replace('_', '-')}; pip install 'qft[{extra}]'"


def find_job(folder: Path, loaded: LoadedRecipe, options: ExportOptions, view: View) -> Job:
    """What a run is to an exporter. Raises RunError if it did not complete."""
    run = Run(folder)
    manifest = run.manifest()
    status = manifest.status if manifest else None
    if status != "complete":
        raise RunError(f"{folder}: the run is {status}, not complete; finish it with `qft train --resume`")
    target = parse_target(str(folder), adapter=None, data=None)
    view.note("Reading the configuration")
    plan = target.plan()
    quantized = target.adapter is not None and plan.scheme != "none"
    asked = options.merge_into or loaded.recipe.export.merge_into
    if options.merge_into and not quantized:
        raise RecipeError(f"--merge-into {asked}: has no meaning for a run whose base is not quantized")
    job = Job(run, loaded, target, plan, "dequantized" if quantized else None, view)
    return job if asked == "auto" or not quantized else replace(job, merge_into=asked)


def for_target(job: Job, name: str, options: ExportOptions) -> Job:
    """The job with what `auto` means for this target."""
    auto = options.merge_into is None and job.loaded.recipe.export.merge_into == "auto"
    loses = EXPORTERS[name].regrids and job.plan.scheme == "4bit"
    return replace(job, merge_into="original") if auto and loses and job.merge_into else job


def _require_room(
    job: Job, names: Sequence[str], out: Path, options: ExportOptions, registration: Registration | None
) -> None:
    """Raises RunError if something is in the way, the disk is too full or the registry of no use, and whatever the
    exporter refuses besides."""
    for name in names:
        if (out / name).exists() and not options.overwrite:
            raise RunError(f"{out / name}: is there already; give --overwrite, or another folder with --out")
    needed = sum(EXPORTERS[name].needed_bytes(for_target(job, name, options)) for name in names)
    require_free_space(out, needed, "the export")
    if registration:
        registration.require_possible(out, names, needed)
    job.view.note(f"Needs up to {needed / 2**30:.2f} GiB of the {free_bytes(out) / 2**30:.2f} GiB that are free")


def _export(job: Job, name: str, final: Path, expected: Reference | None) -> ExportDocument:
    """One artifact. Raises GateError if it is refused; it is then at `final`.failed, and `final` is as it was."""
    exporter, failed = EXPORTERS[name], final.with_name(f"{name}.failed")
    job.view.note(f"Writing {name}")
    with atomic_folder(final) as folder:
        quantization = exporter.write(job, folder)
        gate = UNVERIFIED
        if expected:
            job.view.note(f"Loading {name} again")
            gate = judge(job, name, folder, expected)
        told = final if gate.passed is not False else failed
        document = _document(job, name, folder, told, gate, quantization)
        write_text(folder / "README.md", model_card(job, exporter, document))
        write_json(folder / "export.json", document.model_dump(mode="json"))
        shutil.rmtree(failed, ignore_errors=True)
        if gate.passed is False:
            folder.chmod(0o755)
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


def judge(job: Job, name: str, folder: Path, expected: Reference) -> Gate:
    """The verdict over the files in `folder`, by the limits of target and recipe."""
    exporter = EXPORTERS[name]
    default = exporter.limits_original if exporter.merges and job.merge_into == "original" else exporter.limits
    gate = verify(job, exporter, folder, expected, default.under(job.loaded.recipe.export.gate))
    missed = any(check.name in LIMITED and not check.passed for check in gate.checks)
    if exporter.reader and missed:
        return gate.model_copy(update={"worst_weight": worst_weight(job, exporter.reader(job, folder))})
    return gate


def _document(
    job: Job, name: str, folder: Path, told: Path, gate: Gate, quantization: dict[str, Any] | None
) -> ExportDocument:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in SIDE)
    base = job.run.base
    assert base is not None  # the run is complete
    return ExportDocument(
        target=name,
        path=str(told),
        run=str(job.run.folder),
        passed=gate.passed,
        bytes=sum(path.stat().st_size for path in files),
        sha256={str(path.relative_to(folder)): sha256(path) for path in files},
        base=base.model_dump(),
        merge_into=job.merge_into if EXPORTERS[name].merges else None,
        dtype=job.dtype,
        quantization=quantization,
        gate=gate,
        versions=versions(),
    )


def _refusal(gate: Gate, failed: Path) -> str:
    missed = [f"{c.name} is {_short(c.value)}, not {_short(c.threshold)}" for c in gate.checks if not c.passed]
    where = f" (farthest from what it should be: {gate.worst_weight})" if gate.worst_weight else ""
    return f"{failed}: is not the model that was trained: {'; '.join(missed)}{where}. It was left there to look at"


def _short(value: float | str | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)[:80]
