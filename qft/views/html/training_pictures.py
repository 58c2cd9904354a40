"""The pictures of a training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from qft.documents.training import Memory, Report
from qft.views.html.chart import COLOUR, Line, Picture, Table, axis, curves, each_and_smooth, evenly, finite, thin
from qft.views.words import binary_unit, count, number, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def loss(report: Report) -> Picture:
    """Of each step, smoothed, and of the held-out rows."""
    history = report.loss.history
    measured = [e for e in (report.eval.before, *report.eval.history, report.eval.after) if e is not None]
    by_step = {e.step: e.loss for e in measured}  # the one after the training is often also the last within it
    held_out = finite(sorted(by_step.items()))
    lines = each_and_smooth(finite((step, value) for step, value, *_ in history))
    if held_out:
        lines.append(Line("held-out rows", held_out, "c2", ":", 1.2, "D"))
    if not lines:
        return Picture("loss", "Loss", "The loss of each step was not measured.")
    table = _over_steps(history, {"Loss": number, "Learning rate": "{:.3g}".format, "Gradient norm": number})
    key = [line.key for line in lines]
    return Picture("loss", "Loss", _loss_sentence(report, held_out), curves(lines, unit="nats a token"), table, key)


def _loss_sentence(report: Report, held_out: Sequence[tuple[float, float]]) -> str:
    said = f"The training loss went from {number(report.loss.first)} to {number(report.loss.last)}"
    said += f" (lowest {number(report.loss.lowest)}) in {count(report.steps, 'step')}."
    if not held_out:
        return f"{said} The held-out loss was not measured."
    (first, before), (last, after) = held_out[0], held_out[-1]
    then = f" and {number(after)} at step {last:,.0f}" if len(held_out) > 1 else ""
    return f"{said} The held-out loss was {number(before)} at step {first:,.0f}{then}."


def _over_steps(history: Sequence[tuple[float, ...]], columns: Mapping[str, Callable[[float], str]]) -> Table:
    """Figures of some of the steps."""
    rows = [
        (f"{step:,.0f}", *(show(value) for show, value in zip(columns.values(), values, strict=True)))
        for step, *values in evenly(history)
    ]
    return Table(("Step", *columns), rows, len(history))


def learning_rate(report: Report) -> Picture:
    points = finite((step, rate) for step, _, rate, _ in report.loss.history)
    if not points:
        return Picture("rate", "Learning rate", "The learning rate was not measured.")
    rates = [rate for _, rate in points]
    power = math.floor(math.log10(max(rates))) if max(rates) > 0 else 0
    scaled = Line("", [(step, rate / 10.0**power) for step, rate in points])
    said = f"It began at {rates[0]:.3g}, was {max(rates):.3g} at most and ended at {rates[-1]:.3g}."
    paint = curves([scaled], unit="" if power in (0, 1) else f"in 1e{power}", from_zero=True)
    return Picture("rate", "Learning rate", said, paint, _over_steps(points, {"Learning rate": "{:.3g}".format}))


def throughput(report: Report) -> Picture:
    measured = report.throughput
    lines = each_and_smooth(finite(measured.history))
    if not lines:
        return Picture("throughput", "Throughput", "The throughput of each step was not measured.")
    said = f"{measured.tokens_per_second:,.0f} tokens a second, padding aside; a step took "
    said += f"{measured.step_seconds_p50:.3g} s at the median and {measured.step_seconds_p95:.3g} s at the 95th "
    paint, table = curves(lines, unit="tokens/s", from_zero=True), _over_steps(measured.history, {"Tokens/s": number})
    return Picture("throughput", "Throughput", f"{said}percentile.", paint, table, [line.key for line in lines])


def memory(report: Report) -> Picture:
    """The parts of the largest memory so far, and what a step left behind."""
    held, history = report.memory, report.memory.history
    title = f"Memory of the {'GPU' if held.peak_gpu_bytes > 0 else 'process'}"
    if not history:
        return Picture("memory", title, "The memory over the steps was not measured.")
    peak = max(high for _, _, high in history)
    parts = _parts(held, peak)
    limit = held.device_bytes if held.device_bytes <= 2 * peak else 0
    key = [("solid ink", f"largest so far: {size(peak)}"), ("dashed ink", f"after a step: {size(history[-1][1])}")]
    key += [(f"area {colour}", f"{name}: {size(part)}") for name, part, colour in reversed(parts)]
    if limit:
        key.insert(0, ("dashdot ink", f"the device's limit: {size(limit)}"))
    activations, weights = held.components.activations, size(held.components.base_weights)
    rest = "" if activations is None else f"{size(activations)} of them activations and workspace, "
    said = f"At most {size(peak)} were held, {rest}{weights} base weights. The device has {size(held.device_bytes)}"
    said += "." if limit else ", which is beyond the picture."
    paint = partial(_paint_memory, held=held, parts=parts, limit=limit, peak=peak)
    table = _over_steps(history, {"After it": size, "Largest so far": size})
    return Picture("memory", title, said, paint, table, key, height=240)


def _parts(held: Memory, peak: int) -> list[tuple[str, int, str]]:
    """[name, bytes, colour] of what the memory holds, from the bottom up; activations are the last."""
    told = held.components.model_dump(exclude_none=True)
    rest = told.pop("undivided", None)
    parts = {name.replace("_", " "): part for name, part in told.items()}
    if rest is not None:
        parts["activations, libraries and what the allocator keeps"] = rest
    elif (beside := (held.peak_gpu_bytes or held.peak_host_bytes) - sum(parts.values())) > peak / 100:
        parts = {"the rest of the process": beside} | parts
    colours = ("c6", "c3", "c4", "c5", "c2", "c1")[-len(parts) :]
    return [(name, part, colour) for (name, part), colour in zip(parts.items(), colours, strict=True)]


def _paint_memory(axes: Axes, held: Memory, parts: Sequence[tuple[str, int, str]], limit: int, peak: int) -> None:
    unit, divisor = binary_unit(limit or peak)
    tops = thin([(step, high / divisor) for step, _, high in held.history])
    left_behind = thin([(step, now / divisor) for step, now, _ in held.history])
    if len(held.history) == 1:  # a line needs two ends
        tops, left_behind = ([(x + d, y) for d in (-0.5, 0.5) for x, y in line] for line in (tops, left_behind))
    steps, highs = zip(*tops, strict=True)
    floor = [0.0] * len(tops)
    for _, part, colour in parts:
        most = math.inf if colour == "c1" else part / divisor
        ceiling = [min(low + most, high) for low, high in zip(floor, highs, strict=True)]
        axes.fill_between(steps, floor, ceiling, color=COLOUR[colour], alpha=0.8, linewidth=0)
        floor = ceiling
    axes.plot(steps, highs, color=COLOUR["ink"], linewidth=1.6)
    axes.plot(*zip(*left_behind, strict=True), "--", color=COLOUR["ink"], linewidth=1.2)
    if limit:
        axes.axhline(limit / divisor, color=COLOUR["ink"], linewidth=1.6, linestyle=":")
    axes.set_xlim(steps[0], steps[-1])
    axes.set_ylim(0, (limit or peak) / divisor * 1.08 or 1)
    axis(axes, unit=unit, below="step")


def phases(report: Report) -> Picture:
    shares = report.phases.model_dump()

    def paint(axes: Axes) -> None:
        for i, (name, share) in enumerate(shares.items()):
            axes.barh(i, 1, 0.24, color=COLOUR["line"])
            axes.barh(i, share, 0.24, color=COLOUR["c1"])
            axes.annotate(name, (0, i), (0, 10), textcoords="offset points")
            axes.annotate(f"{share:.1%}", (1, i), (0, 10), textcoords="offset points", ha="right")
        axes.set(xlim=(0, 1), ylim=(len(shares) - 0.6, -0.75))
        axes.set_axis_off()

    said = f"Shares of the time of the steps: {', '.join(f'{name} {share:.1%}' for name, share in shares.items())}."
    table = Table(("Phase", "Share"), [(name, f"{share:.2%}") for name, share in shares.items()])
    return Picture("phases", "Where the time went", said, paint, table, height=150, margins=(4, 4, 4, 4))


def lengths(bins_of: Sequence[tuple[int, int]]) -> Picture:
    """Of [longest of the bin in tokens, rows]."""
    title = "Length of the training rows"
    if not bins_of:
        return Picture("lengths", title, "The lengths of the rows were not measured.")
    ends, rows = zip(*bins_of, strict=True)
    starts = [0, *ends[:-1]]

    def paint(axes: Axes) -> None:
        widths = [0.88 * (end - start) for start, end in zip(starts, ends, strict=True)]
        axes.bar(starts, rows, widths, align="edge", color=COLOUR["c1"])
        axes.set_xlim(0, ends[-1])
        axes.margins(y=0.08)
        axis(axes, unit="rows", below="tokens")

    most = max(rows)
    bins = [f"{start + 1:,} to {end:,}" for start, end in zip(starts, ends, strict=True)]
    said = f"{sum(rows):,} rows of at most {ends[-1]:,} tokens; most, {most:,}, have {bins[rows.index(most)]}."
    table = Table(("Tokens", "Rows"), [(tokens, f"{n:,}") for tokens, n in zip(bins, rows, strict=True)])
    return Picture("lengths", title, said, paint, table)
