"""The report as rich tables."""

import os
from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from qft.documents.memory import PhaseMemory
from qft.documents.training import Report, StageReport
from qft.views.terminal.table import Facts, Rows, Whole, bullets, spaced
from qft.views.words import share_held, si, size, sparkline

PART_NAMES = {"undivided": "the rest, undivided"}


def render(report: Report) -> Group:
    """All of the report, for a terminal of 80 columns or more."""
    advice = [Group(Text("Advice", style="bold"), *bullets(report.advice))] if report.advice else []
    written = Whole(f"Written to {_from_here(report.result)}")
    stages = [_stages(report.stages)] if report.stages else []
    return spaced(_model(report), _learning(report), *stages, _speed(report), _memory(report), *advice, written)


def _from_here(path: str) -> str:
    """The path as one would type it here."""
    try:
        here = os.path.relpath(path)
    except OSError:  # the folder where the command was started is gone
        return path
    return path if here.startswith("..") else here


def _model(report: Report) -> Facts:
    model = report.model
    held = {"none": f"{model.dtype}, not quantized", "8bit": "8 bit, LLM.int8()"}.get(
        model.scheme, f"{model.scheme}{f', {model.quant_type}' if model.quant_type else ''}"
    )
    rows = Facts("Model")
    rows.add("base", f"{model.architecture}, {si(model.parameters)} parameters")
    rows.add("held as", f"{held}: {model.bits_per_weight:.2f} bits a weight with scales, norms and head")
    if model.scheme != "none" and (share := share_held(model.quantized_share)):
        rows.add("", share)
    if skipped := report.skipped_modules:
        bought = f"KL {skipped.kl_before:.4f} to {skipped.kl_after:.4f}"
        more = size(skipped.linear_bytes_after - skipped.linear_bytes_before)
        rows.add("left in 16 bits", f"{len(skipped.names)} layers: {bought} for {more}")
    rows.add("trained", f"{si(model.trainable_parameters)} parameters ({model.trainable_share:.2%})")
    rows.add("on", model.device)
    return rows


def _add_kernels(rows: Facts, report: Report) -> None:
    if report.kernels:
        fused = ", ".join(f"{count} {name}" for name, count in report.kernels.fused.items())
        rows.add("fused", fused or "nothing")
        for reason, count in report.kernels.plain.items():
            rows.add("", f"not {count} modules: {reason}")


def _learning(report: Report) -> Rows:
    rows = Rows("Learning", "", "before", "after")
    before, after = report.eval.before, report.eval.after
    rows.add("training loss", f"{report.loss.first:.4f}", f"{report.loss.last:.4f}")
    if before and after:
        rows.add(f"held-out loss ({after.rows} rows)", f"{before.loss:.4f}", f"{after.loss:.4f}")
        rows.add("held-out perplexity", f"{before.perplexity:.2f}", f"{after.perplexity:.2f}")
        for name, score in after.scores.items():
            first = before.scores.get(name)  # a resumed run may be asked for more
            rows.add(name.replace("_", " "), "" if first is None else f"{first:.1%}", f"{score:.1%}")
    if balance := report.balance:
        told = f"balance loss of the experts (x {balance.coefficient:g})"
        rows.add(told, f"{balance.first:.4f}", f"{balance.last:.4f}")
    line = sparkline([loss for _, loss, _, _ in report.loss.history], 24)
    rows.add("curve", line, f"{report.loss.spikes} spikes in {report.steps} steps")
    return rows


def _stages(stages: Sequence[StageReport]) -> Rows:
    """Held-out losses are of each stage's own base; what is not known is left empty."""
    table = Rows("Stages", "", "steps", "held as", "loss", "held out", "tokens/s", "peak")
    for number, stage in enumerate(stages, 1):
        model, loss, speed = stage.model, stage.loss, stage.throughput
        evaluated = [f"{each.loss:.4f}" for each in (stage.before, stage.after) if each]
        table.add(
            str(number),
            f"{stage.first_step} to {stage.last_step}",
            (model.quant_type or model.scheme.replace("none", model.dtype)) if model else "",
            f"{loss.first:.4f} → {loss.last:.4f}" if loss else "",
            " → ".join(evaluated),
            f"{speed.tokens_per_second:,.0f}" if speed else "",
            size(stage.peak_bytes) if stage.peak_bytes else "",
        )
    return table


def _speed(report: Report) -> Facts:
    throughput, phases = report.throughput, report.phases
    rows = Facts("Speed")
    rows.add("throughput", f"{throughput.tokens_per_second:,.0f} tokens/s, {throughput.samples_per_second:.2f} rows/s")
    rows.add("step", f"{throughput.step_seconds_p50:.3f} s median, {throughput.step_seconds_p95:.3f} s 95th percentile")
    shares = (f"{name} {share:.0%}" for name, share in phases.model_dump().items())
    rows.add("time in", ", ".join(shares))
    _add_kernels(rows, report)
    rows.add("in all", f"{report.steps} steps, {report.tokens:,} tokens, {report.wall_seconds:.0f} s")
    if report.resumed_from:
        missing = f"; the first {report.unmeasured_steps} steps left no figures" if report.unmeasured_steps else ""
        rows.add("resumed from", f"step {', '.join(map(str, report.resumed_from))}{missing}")
    return rows


def _memory(report: Report) -> Facts:
    memory = report.memory
    parts = report.memory.components.model_dump(exclude_none=True)
    on_gpu = memory.peak_gpu_bytes > 0
    peak = memory.peak_gpu_bytes if on_gpu else memory.peak_host_bytes
    rows = Facts("Memory")
    for name, count in parts.items():
        bar = "█" * round(24 * count / max(*parts.values(), 1))
        rows.add(PART_NAMES.get(name, name.replace("_", " ")), f"{size(count):>10}  {bar}")
    foretold = {"GPU": memory.predicted_peak_bytes, "host": memory.predicted_host_bytes}
    told = {name: f"; {size(count)} predicted" if count else "" for name, count in foretold.items()}
    name = "GPU" if on_gpu else "host"
    rows.add(f"peak, {name}", f"{size(peak):>10}  of {size(memory.device_bytes)}{told[name]}")
    if on_gpu:
        rows.add("peak, host", f"{size(memory.peak_host_bytes):>10}{told['host']}")
    if memory.phases:
        rows.add(
            "peak by phase", ", ".join(f"{name.replace('_', ' ')} {_most(p)}" for name, p in memory.phases.items())
        )
    if on_gpu and (train := memory.phases.get("train")):
        idle, split = size(train.gpu_fragmentation_bytes or 0), size(train.gpu_inactive_split_bytes or 0)
        rows.add("fragmentation", f"{idle} reserved beyond what tensors took, {split} of it split")
    if memory.gpu_allocator:
        rows.add("allocator", memory.gpu_allocator)
    for event in report.out_of_memory:
        rows.add("ran out", event.told())
    if memory.offloaded_bytes:
        rows.add("off the device", f"{size(memory.offloaded_bytes):>10}")
    moments = (memory.after_load_bytes, memory.after_first_step_bytes, memory.at_end_bytes)
    trend = " (growing)" if memory.growing else ""
    rows.add("load → step 1 → end", " → ".join(size(m) for m in moments) + trend)
    if memory.leak:
        rows.add("leak", f"{memory.leak.suspect}: {memory.leak.evidence}")
    return rows


def _most(phase: PhaseMemory) -> str:
    """Of the GPU if there is one, and of the process."""
    host = size(phase.host_resident_bytes)
    return host if phase.gpu_allocated_bytes is None else f"{size(phase.gpu_allocated_bytes)} (process {host})"
