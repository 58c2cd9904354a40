"""`qft calibrate`: a trained model, quantized for inference, and proof of what it cost."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from qft.calibration.blockwise import Quantization
from qft.calibration.streamed import Read, StreamedModel
from qft.calibration.whole import WholeModel, load_result
from qft.checkpoint.weights import read_weights
from qft.data.prepare import Prepared
from qft.documents.calibration import Attempt, CalibrationReport, Check
from qft.documents.evaluation import LayerError, Score
from qft.errors import GateError, MissingError, RunError
from qft.files import atomic_folder, write_json, write_text
from qft.machine.device import versions
from qft.measure.likelihood import Likelihood, Verification
from qft.measure.scores import answer_rows, score
from qft.measure.statistics import interval
from qft.memory.guard import memory_guard
from qft.memory.meter import Meter
from qft.model.load import generation_config, load_base
from qft.model.target import load_target, parse_target
from qft.plan import CalibrationPlan, plan_calibration
from qft.progress import View
from qft.quant.engines import LayerScheme
from qft.recipe import LoadedRecipe, load
from qft.recipe.rules import WHOLE_MODEL
from qft.recipe.schema import AcceptSection, CalibrateSection
from qft.run.folder import Run, record_base, start_calibration

__all__ = ["calibrate", "find_plan"]

Schemes = dict[str, LayerScheme | None]

SIBLINGS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
"""Layers that inference engines fuse into one, so that they must be held alike."""


def find_plan(loaded: LoadedRecipe, trained: Prepared | None = None) -> tuple[CalibrationPlan, Path | None]:
    """The plan, and the run whose adapter is to be merged first, where model.path names one. `trained` is the
    recipe's data section as a training has it, if it has been encoded."""
    path = Path(loaded.recipe.model.path)
    run = Run(path)
    if not run.manifest():
        return plan_calibration(loaded, trained), None
    if not run.adapter.is_dir() and not run.full_model.is_dir():
        raise MissingError(f"{path}: the run has neither an adapter nor a model; it did not complete")
    base = load(run.folder / "recipe.yaml").recipe.model
    if run.full_model.is_dir():
        base = base.having(path=str(run.full_model.resolve()), revision=None)
    plan = plan_calibration(loaded.having(model={"path": base.path, "revision": base.revision}))
    return plan, path if run.adapter.is_dir() else None


def calibrate(loaded: LoadedRecipe, view: View, *, resume: bool = False, overwrite: bool = False) -> CalibrationReport:
    """Quantize into output_dir/model, block by block or all at once as the engine does, unless it is refused.

    Raises GateError if calibrate.accept is not met: report.json then has the figures, and no model is left. Raises
    RecipeError, MissingError, DataError, ModelError or RunError for what cannot be done."""
    started = time.perf_counter()
    plan, merged_run = find_plan(loaded)
    if resume and plan.whole_model:
        raise RunError(
            f"{plan.recipe.output_dir}: calibrate.engine {plan.calibrate.engine} quantizes the whole model at once, "
            "and leaves nothing to resume from; use --overwrite to start again"
        )
    run = start_calibration(plan, _needed_bytes(plan), resume=resume, overwrite=overwrite)
    try:
        guard = memory_guard("calibrating", _smaller(plan.calibrate))
        with run.failure_noted(), guard, Meter(plan.model.device.kind) as meter:
            report = _Calibration(plan, run, view, meter, merged_run).run_all(started)
    finally:
        if plan.whole_model:
            shutil.rmtree(run.work, ignore_errors=True)
    write_json(run.report, report.model_dump(mode="json"))
    run.set_status("complete" if report.accepted else "refused")
    if not report.accepted:
        raise GateError(_refusal(report, run))
    shutil.rmtree(run.work, ignore_errors=True)
    return report


class _Calibration:
    def __init__(self, plan: CalibrationPlan, run: Run, view: View, meter: Meter, merged_run: Path | None) -> None:
        self.plan, self.run, self.view, self.meter = plan, run, view, meter
        self.before = meter.settled()
        meter.restart()
        set_seed(plan.seed)
        view.note(f"Reading {plan.model.checkpoint.path}")
        self.merged_run = merged_run
        self.work = self._begin()
        record_base(run, plan.model)
        write_text(run.folder / "calibration.jsonl", plan.data.as_jsonl())
        self.attempts: list[Attempt] = []
        self.scores_before: dict[str, float] = {}

    def _begin(self) -> Quantization | WholeModel:
        plan, merged = self.plan, self.merged_run
        if plan.whole_model:
            plan.model.checkpoint.with_weights()
            unquantized = partial(_load_unquantized, plan, merged)
            return WholeModel(plan, self.run.work, self.view, unquantized, merged=merged is not None)
        return Quantization(plan, StreamedModel(plan.model, _reader(plan, merged)), self.run.work, self.view)

    def run_all(self, started: float) -> CalibrationReport:
        first = self.work.quantize()
        checks, result = self._attempt(self.plan.schemes, first)
        if not _passed(checks) and self.plan.calibrate.remedy == "auto" and isinstance(self.work, Quantization):
            for schemes in self._remedies(self.work):
                number = len(self.attempts)
                checks, result = self._attempt(schemes, self.work.again(schemes, number))
                if _passed(checks):
                    break
        return self._report(first, checks, result, time.perf_counter() - started)

    def _attempt(self, schemes: Schemes, found: Verification) -> tuple[list[Check], Path | None]:
        """Judge one way to hold the layers, and write the model if it is accepted."""
        number, accept = len(self.attempts), self.plan.calibrate.accept
        attempt = self._measured(schemes, found)
        checks = _checks(attempt, accept)
        result = None
        if _passed(checks):
            try:
                with atomic_folder(self.run.full_model) as folder:
                    self._assemble(folder, schemes, number)
                    if accept.score_drop is not None:
                        attempt = attempt.model_copy(update={"scores": self._scores(folder)})
                        checks.append(self._score_check(attempt, accept.score_drop))
                        if not checks[-1].passed:
                            raise _MissedError
                result = self.run.full_model
            except _MissedError:
                pass
        self.view.note(_told(attempt, checks))
        self.attempts.append(attempt)
        return checks, result

    def _measured(self, schemes: Schemes, found: Verification) -> Attempt:
        seed, rows = self.plan.seed, len(self.work.rows)
        change = found.after.perplexity_change(found.before, seed=seed)
        assert found.after.divergence is not None
        kl, agrees = found.after.divergence.kl, found.after.divergence.agrees
        before = self.plan.schemes
        raised = {name: scheme.bits if scheme else 16 for name, scheme in schemes.items() if scheme != before[name]}
        return Attempt(
            kept=raised,
            weight_bytes=self.work.weight_bytes(len(self.attempts)),
            perplexity=_perplexity(found.after, seed),
            perplexity_change=Score.of(change),
            kl_mean=float(kl.mean()),
            kl_interval=Score.of(interval(found.after.mean_kl, rows, seed=seed)),
            kl_p99=float(np.percentile(kl, 99)),
            top1_agreement=float(agrees.mean()),
        )

    def _remedies(self, work: Quantization) -> Iterator[Schemes]:
        """The worst layers in 8 bits, then in 16; one more, two more, four more, … as far as max_bytes allows."""
        schemes, units = dict(self.plan.schemes), self._units()
        limit = self.plan.calibrate.max_bytes
        size, used = dict.fromkeys(schemes, 0), self.attempts[0].weight_bytes
        size |= {error.name: error.bytes for error in work.errors()}
        for raised in _ladder(self.plan):
            done = 0
            while done < len(units):
                count, before = done + 1, dict(schemes)
                for unit in units[done : done + count]:
                    wanted = {name: work.model.weights_of(name) * (raised.bits if raised else 16) // 8 for name in unit}
                    more = sum(wanted.values()) - sum(size[name] for name in unit)
                    if limit is None or used + more <= limit:
                        schemes |= dict.fromkeys(unit, raised)
                        size, used = size | wanted, used + more
                done += count
                if schemes != before:
                    yield dict(schemes)

    def _units(self) -> list[list[str]]:
        """Layers that are raised together, those with the noisiest output first."""
        noise: dict[tuple[str, str], list[LayerError]] = {}
        for error in self.work.errors():
            owner, _, kind = error.name.rpartition(".")
            fused = next((min(group) for group in SIBLINGS if kind in group), kind)
            noise.setdefault((owner, fused), []).append(error)
        order = sorted(noise.values(), key=lambda errors: min(error.output_snr_db for error in errors))
        return [[error.name for error in errors] for errors in order]

    def _assemble(self, folder: Path, schemes: Schemes, attempt: int) -> None:
        """The model as engines load it: weights, configuration and tokenizer."""
        self.work.assemble(folder, schemes, attempt)
        generation_config(self.plan.model).save_pretrained(folder)
        self.plan.model.tokenizer.save_pretrained(folder)
        manifest = self.run.manifest()
        record = {
            "base": manifest["base"],
            "data": manifest["data"],
            "versions": self._versions(),
            "seed": self.plan.seed,
        }
        if plugin := manifest["plugin"]:
            record["plugin"] = plugin | {"path": Path(plugin["path"]).name}
        write_json(folder / "calibration.json", record)

    def _scores(self, folder: Path | None) -> dict[str, float]:
        """Task scores of the result in `folder`, loaded by its engine; of the unquantized model without one."""
        settings = self.plan.recipe.eval
        model = load_result(self.plan, folder) if folder else _load_unquantized(self.plan, self.merged_run)
        answers = answer_rows(
            model.eval(),
            self.plan.model.tokenizer,
            self.plan.data.verify,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            samples=settings.samples,
        )
        return {name: score(name, answers, pattern=settings.regex).value for name in settings.metrics}

    def _versions(self) -> dict[str, str | None]:
        return versions() | (self.work.versions if isinstance(self.work, WholeModel) else {})

    def _score_check(self, attempt: Attempt, limit: float) -> Check:
        if not self.scores_before:
            self.scores_before = self._scores(None)
        drop = max(self.scores_before[name] - attempt.scores[name] for name in attempt.scores)
        return Check(name="score_drop", value=drop, limit=limit, passed=drop <= limit)

    def _report(
        self, found: Verification, checks: list[Check], result: Path | None, wall_seconds: float
    ) -> CalibrationReport:
        plan, peak, of_engine = self.plan, self.meter.peak(), (0, 0)
        if isinstance(self.work, WholeModel):
            of_engine = self.work.peak_bytes, self.work.peak_host_bytes
        return CalibrationReport(
            model=plan.recipe.model.path,
            device=plan.model.device.name,
            engine=plan.calibrate.engine,
            scheme=_scheme(plan),
            quantized_layers=len(self.work.quantized_layers),
            skipped_layers=self.work.skipped_layers,
            calibration=asdict(plan.data.audit) if plan.data.audit else None,
            warnings=list(plan.data.warnings),
            verify_rows=len(self.work.rows),
            verify_tokens=int(found.before.tokens.sum()),
            perplexity_before=_perplexity(found.before, plan.seed),
            scores_before=self.scores_before,
            attempts=self.attempts,
            checks=checks,
            accepted=result is not None,
            bytes_before=plan.model.shape.parameters * getattr(torch, plan.model.dtype).itemsize,
            bytes_after=self.attempts[-1].weight_bytes,
            layers=self.work.errors(),
            peak_bytes=max(peak.beyond(self.before), of_engine[0]),
            peak_host_bytes=max(peak.host, of_engine[1]),
            block_seconds=self.work.block_seconds,
            tokens_per_second=self.work.tokens_per_second(),
            wall_seconds=wall_seconds,
            seed=plan.seed,
            versions=self._versions(),
            result=str(result) if result else None,
        )


class _MissedError(Exception):
    """A written model is not accepted."""


def _reader(plan: CalibrationPlan, merged_run: Path | None) -> Read:
    if merged_run is None:
        return read_weights(plan.model.checkpoint.with_weights())
    weights: dict[str, torch.Tensor] = _load_unquantized(plan, merged_run, device="cpu").state_dict()
    return weights.__getitem__


def _load_unquantized(plan: CalibrationPlan, merged_run: Path | None, device: str | None = None) -> Any:
    """The model that is quantized, whole."""
    if merged_run is None:
        return load_base(plan.model)
    target = parse_target(f"{merged_run}@merged", adapter=None, data=None)
    section = plan.recipe.model
    own = {
        "device": device or section.device,
        "dtype": plan.model.dtype,
        "attn_implementation": section.attn_implementation,
    }
    target = replace(target, loaded=target.loaded.having(model=own))
    return load_target(target, target.plan())


def _smaller(calibrate: CalibrateSection) -> Iterator[str]:
    """What lets a calibration take less."""
    if calibrate.samples > 1:
        yield f"lower calibrate.samples ({calibrate.samples})"
    yield f"lower calibrate.max_length ({calibrate.max_length})"


def _scheme(plan: CalibrationPlan) -> dict[str, Any]:
    """As the report tells it."""
    if plan.quantized:
        return dict(plan.quantized.quantization)
    scheme = asdict(next(scheme for scheme in plan.schemes.values() if scheme))
    return scheme | ({"algorithm": plan.algorithm} if plan.algorithm else {})


def _ladder(plan: CalibrationPlan) -> list[LayerScheme | None]:
    """What the remedy raises layers to; None is 16 bits."""
    in_8_bits = LayerScheme("int", 8)
    # compressed-tensors loads packed zero points only where all layers are held alike.
    takes_8 = plan.calibrate.data_type == "int" and plan.calibrate.bits == 4 and plan.calibrate.symmetric
    return [in_8_bits, None] if takes_8 else [None]


def _needed_bytes(plan: CalibrationPlan) -> int:
    """Room for the blocks, the model made of them, and two sets of hidden states; for engines that take the whole model
    its unquantized weights, and the result twice."""
    if plan.whole_model:
        return plan.model.shape.parameters * 2 * 3
    quantized = sum(scheme.bits if scheme else 0 for scheme in plan.schemes.values())
    bits = quantized / max(sum(scheme is not None for scheme in plan.schemes.values()), 1)
    linears = plan.model.shape.linear_parameters
    weights = (plan.model.shape.parameters - linears) * 2 + linears * (bits + 1) / 8
    tokens = sum(map(len, plan.data.windows)) + sum(len(row["input_ids"]) for row in plan.data.verify)
    return int(2 * weights + 2 * 2 * tokens * plan.model.shape.hidden_size * 4)


def _checks(attempt: Attempt, accept: AcceptSection) -> list[Check]:
    """Of what needs no generation."""
    asked = {
        "perplexity_increase": (attempt.perplexity_change.value, accept.perplexity_increase),
        "kl": (attempt.kl_mean, accept.kl),
    }
    return [
        Check(name=name, value=value, limit=limit, passed=value <= limit)
        for name, (value, limit) in asked.items()
        if limit is not None
    ]


def _passed(checks: Iterable[Check]) -> bool:
    return all(check.passed for check in checks)


def _perplexity(likelihood: Likelihood, seed: int) -> Score:
    return Score.of(interval(likelihood.perplexity, len(likelihood.tokens), seed=seed))


def _told(attempt: Attempt, checks: list[Check]) -> str:
    kept = f", {len(attempt.kept)} layers in more bits" if attempt.kept else ""
    verdict = ": accepted" if _passed(checks) else ": not accepted"
    return (
        f"{attempt.weight_bytes / 2**20:,.1f} MiB{kept}: perplexity {attempt.perplexity.value:.3f} "
        f"({attempt.perplexity_change.value:+.2%}), KL {attempt.kl_mean:.4f}{verdict if checks else ''}"
    )


def _refusal(report: CalibrationReport, run: Run) -> str:
    missed = [
        f"{check.name} is {check.value:.4g}, above {check.limit:.4g}" for check in report.checks if not check.passed
    ]
    tried = f" after {len(report.attempts)} attempts" if len(report.attempts) > 1 else ""
    told = f"{run.folder}: not accepted{tried}: {'; '.join(missed)}."
    if report.engine in WHOLE_MODEL:
        section = "quant" if report.engine == "custom" else "calibrate"
        return f"{told} Hold more bits, leave layers out ({section}.skip_modules), or accept more"
    return (
        f"{told} Hold more bits (calibrate.bits, a smaller group_size, skip_modules), let calibrate.remedy: auto "
        "choose the layers, or accept more; --resume then takes the blocks as they are"
    )
