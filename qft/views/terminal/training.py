"""The report as rich tables."""

from __future__ import annotations

import os

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qft.documents.training import Evaluation, Report
from qft.views.terminal.table import table
from qft.views.words import si, size, sparkline

__all__ = ["render"]


def render(report: Report) -> Group:
    """All of the report, for a terminal of 80 columns or more."""
    parts: list[RenderableType] = []
    for part in (_model(report), _learning(report), _speed(report), _memory(report)):
        parts += ["", part]
    if report.advice:
        parts += ["", Text("Advice", style="bold"), *(Text(f"• {line}") for line in report.advice)]
    return Group(*parts, "", Text(f"Written to {_from_here(report.result)}"))


def _from_here(path: str) -> str:
    """The path as one would type it here."""
    here = os.path.relpath(path)
    return path if here.startswith("..") else here


def _model(report: Report) -> Table:
    model = report.model
    held = {"none": f"{model.dtype}, not quantized", "8bit": "8 bit, LLM.int8()"}.get(
        model.scheme, f"{model.scheme}{f', {model.quant_type}' if model.quant_type else ''}"
    )
    rows = table("Model")
    rows.add_row("base", f"{model.architecture}, {si(model.parameters)} parameters")
    rows.add_row("held as", f"{held}: {model.bits_per_weight:.2f} bits a weight with scales, norms and head")
    if skipped := report.skipped_modules:
        rows.add_row(
            "left in 16 bits",
            f"{len(skipped.names)} layers: KL {skipped.kl_before:.4f} to {skipped.kl_after:.4f} for "
            f"{size(skipped.linear_bytes_after - skipped.linear_bytes_before)}",
        )
    rows.add_row("trained", f"{si(model.trainable_parameters)} parameters ({model.trainable_share:.2%})")
    rows.add_row("on", model.device)
    return rows


def _learning(report: Report) -> Table:
    rows = table("Learning", "", "before", "after")
    before, after = report.eval.before, report.eval.after
    rows.add_row("training loss", f"{report.loss.first:.4f}", f"{report.loss.last:.4f}")
    if before and after:
        rows.add_row(f"held-out loss ({after.rows} rows)", f"{before.loss:.4f}", f"{after.loss:.4f}")
        rows.add_row("held-out perplexity", f"{before.perplexity:.2f}", f"{after.perplexity:.2f}")
        for name in after.scores:
            rows.add_row(name.replace("_", " "), _score(before, name), _score(after, name))
    line = sparkline([loss for _, loss, _, _ in report.loss.history], 24)
    rows.add_row("curve", line, f"{report.loss.spikes} spikes in {report.steps} steps")
    return rows


def _score(evaluation: Evaluation, name: str) -> str:
    share = evaluation.scores[name]
    return f"{share:.1%}"


def _speed(report: Report) -> Table:
    throughput, phases = report.throughput, report.phases
    rows = table("Speed")
    rows.add_row(
        "throughput", f"{throughput.tokens_per_second:,.0f} tokens/s, {throughput.samples_per_second:.2f} rows/s"
    )
    rows.add_row(
        "step", f"{throughput.step_seconds_p50:.3f} s median, {throughput.step_seconds_p95:.3f} s 95th percentile"
    )
    shares = (f"{name} {share:.0%}" for name, share in phases.model_dump().items())
    rows.add_row("time in", ", ".join(shares))
    rows.add_row("in all", f"{report.steps} steps, {report.tokens:,} tokens, {report.wall_seconds:.0f} s")
    return rows


def _memory(report: Report) -> Table:
    memory, parts = report.memory, report.memory.components.model_dump()
    on_gpu = memory.peak_gpu_bytes > 0
    peak = memory.peak_gpu_bytes if on_gpu else memory.peak_host_bytes
    rows = table("Memory")
    for name, count in parts.items():
        bar = "█" * round(24 * count / max(*parts.values(), 1))
        rows.add_row(name.replace("_", " "), f"{size(count):>10}  {bar}")
    rows.add_row("peak, GPU" if on_gpu else "peak, host", f"{size(peak):>10}  of {size(memory.device_bytes)}")
    if on_gpu:
        rows.add_row("peak, host", f"{size(memory.peak_host_bytes):>10}")
    moments = (memory.after_load_bytes, memory.after_first_step_bytes, memory.at_end_bytes)
    trend = " (growing)" if memory.growing else ""
    rows.add_row("load → step 1 → end", " → ".join(size(m) for m in moments) + trend)
    return rows
