"""The pictures of the pages: matplotlib's SVG, in the colours and the font of the page around it."""

from __future__ import annotations

import io
import math
import re
import statistics
import unicodedata
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from qft.documents.evaluation import LayerError, Score, TargetResult
from qft.documents.training import Evaluation, Report
from qft.views.words import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Picture", "evenly", "interval", "layers", "learning_rate", "lengths", "levels", "loss", "memory", "number"]
__all__ += ["percent", "phases", "plain", "quality", "scores", "shorten", "throughput"]

WIDTH = 360
"""Units of every picture: it is as readable on a phone as beside another one on a wide screen."""
POINTS = 600
"""Most points of a line."""

# matplotlib is given colours that stand for a role, and `_adopt` puts the page's variable in their place.
ROLES = ("ink", "muted", "line", "card", *(f"c{i}" for i in range(1, 7)), *(f"h{i}" for i in range(8)))
COLOUR = {role: f"#0101{i + 1:02x}" for i, role in enumerate(ROLES)}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qft",
    "path.simplify": False,  # `_thin` did it
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # only for where text goes: the page's font is what the reader sees
    "font.size": 12,
    "text.color": COLOUR["ink"],
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": COLOUR["muted"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": COLOUR["muted"],
    "axes.labelsize": 12,
    "grid.color": COLOUR["line"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOUR["muted"],
    "xtick.major.size": 3,
    "ytick.color": COLOUR["muted"],
    "ytick.major.size": 0,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "lines.solid_capstyle": "round",
}
Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""
T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """A picture, what it says in a sentence, and the same as a table."""

    name: str
    """Unique on its page."""
    title: str
    sentence: str
    svg: str = ""
    """What goes into the svg element; empty where there was nothing to draw."""
    height: float = 0
    key: tuple[tuple[str, str], ...] = ()
    """[look, what has it]; a look is two of the page's classes."""
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    measured: int = 0
    """Rows there are in all, where `rows` are a selection."""


@dataclass(frozen=True)
class _Line:
    label: str
    points: Sequence[Point]
    colour: str = "c1"
    style: str = "-"
    width: float = 2
    marker: str = ""

    @property
    def key(self) -> tuple[str, str]:
        look = "dots" if self.marker else "thin" if self.width < 1 else {"-": "solid"}.get(self.style, "dashed")
        return f"{look} {self.colour}", self.label


# ---------------------------------------------------------------------------------------------------- text and numbers


def plain(text: object) -> str:
    """The text without what HTML and XML cannot hold."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(text).replace("\r\n", "\n"))


def shorten(text: str, most: int) -> str:
    """One line of at most `most` characters: what is left out is in the middle."""
    text = " ".join(plain(text).split())
    return text if len(text) <= most else f"{text[: most - most // 2 - 1]}…{text[-(most // 2) :]}"


def number(value: float) -> str:
    """A figure of four digits or so."""
    if not math.isfinite(value):
        return "not finite"
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3g}"
    digits = 4 if abs(value) < 1 else 3 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(digits, 0)}f}"


def percent(share: float) -> str:
    return f"{share:.1%}" if math.isfinite(share) else "not finite"


def _tick(value: float, _: object = None) -> str:
    for limit, divisor, unit in ((1e9, 1.0, ""), (1e6, 1e6, "M"), (1e5, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / divisor:.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{round(value, 10):g}"


def _wide(text: str) -> float:
    """Units that a line of text takes, or a little more."""
    return 12 * sum(1 if unicodedata.east_asian_width(c) in "WF" else 0.57 for c in text)


# ------------------------------------------------------------------------------------------------------------- drawing


def _draw(
    name: str,
    height: float,
    paint: Callable[[Axes], None],
    *,
    left: float = 50,
    right: float = 20,
    top: float = 24,
    bottom: float = 40,
) -> str:
    """What goes into the svg element of a picture with one pair of axes; the margins are in units."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's fonts draw the text
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        box = (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, (height - top - bottom) / height)
        paint(figure.add_axes(box))
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _adopt(out.getvalue(), name)


def _adopt(svg: str, name: str) -> str:
    """The elements within a standalone SVG, fit to stand in a page: its colours, its font, ids of their own."""
    root = ET.fromstring(svg)  # noqa: S314  (matplotlib wrote it a moment ago)
    used = set(re.findall(r"#([\w-]+)", " ".join(value for node in root.iter() for value in node.attrib.values())))
    page = {colour: f"var(--{role})" for role, colour in COLOUR.items()} | {COLOUR["ink"]: "currentColor"}
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        found = {key.rpartition("}")[2]: value for key, value in node.attrib.items()}
        node.attrib.clear()
        for key, value in found.items():
            if key == "id":
                if value in used:
                    node.set("id", f"{name}-{value}")
                continue
            if key == "style":
                value = re.sub(r"#0101[0-9a-f]{2}", lambda match: page[match[0]], value)
                value = re.sub(r"font-family: [^;]*;? ?", "", value)
            elif key in ("href", "clip-path"):
                value = value.replace("#", f"#{name}-")
            elif key in ("d", "x", "y", "transform", "width", "height"):
                value = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), value)
                value = " ".join(value.split())
            node.set(key, value)
        for child in [child for child in node if child.tag.endswith(("}style", "}metadata"))]:
            node.remove(child)
        node.text, node.tail = (part if part and part.strip() else None for part in (node.text, node.tail))
    return "".join(ET.tostring(child, encoding="unicode") for child in root)


def _axis(axes: Axes, *, unit: str = "", below: str = "", whole: bool = True) -> None:
    """Round numbers at both axes, and what they count: above the one, below the other."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.set_xlabel(below, loc="right")
    axes.annotate(unit, (0, 1), (-46, 10), "axes fraction", "offset points", color=COLOUR["muted"])


def _curves(name: str, lines: Sequence[_Line], *, unit: str, from_zero: bool = False) -> str:
    def paint(axes: Axes) -> None:
        for line in lines:
            points = _thin(line.points)
            marker = line.marker or ("o" if len(points) == 1 else "")
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                line.style,
                color=COLOUR[line.colour],
                linewidth=line.width,
                marker=marker,
                markersize=6,
                markeredgecolor=COLOUR["card"],
                markeredgewidth=1,
            )
        axes.margins(0.02, 0.08)
        steps = {x for line in lines for x, _ in line.points}
        if len(steps) == 1:
            axes.set_xlim(min(steps) - 1, max(steps) + 1)
        low, high = axes.get_ylim()
        if from_zero or 0 < low < high / 4:
            axes.set_ylim(bottom=0)
        _axis(axes, unit=unit, below="step")

    return _draw(name, 220, paint)


def _finite(points: Iterable[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _thin(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """At most `most` of the points: the lowest and the highest of equal stretches, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    kept, stretches = [], most // 2
    for i in range(stretches):
        part = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def _each_and_smooth(points: Sequence[Point]) -> list[_Line]:
    """The points, and where they are many the mean over the steps around each: one in twenty, less at the ends."""
    if len(points) < 8:
        return [_Line("each step", points)]
    reach = max(len(points) // 40, 1)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    means = []
    for i, (x, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        means.append((x, (sums[i + near + 1] - sums[i - near]) / (2 * near + 1)))
    return [_Line("each step", points, "c6", width=0.9), _Line(f"mean over {2 * reach + 1:,} steps", means)]


def evenly(rows: Sequence[T], most: int = 25) -> list[T]:
    """At most `most` rows, equally far from each other, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _table(rows: Sequence[tuple[float, ...]], *formats: Callable[[float], str]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (f"{row[0]:,.0f}", *(show(value) for show, value in zip(formats, row[1:], strict=True)))
        for row in evenly(rows)
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- of training


def loss(report: Report) -> Picture:
    """Of each step, smoothed, and of the held-out rows."""
    raw = _finite((step, value) for step, value, *_ in report.loss.history)
    measured = [e for e in (report.eval.before, *report.eval.history, report.eval.after) if e is not None]
    held_out = _finite((e.step, e.loss) for e in _by_step(measured))
    title = "Loss"
    if not raw and not held_out:
        return Picture("loss", title, "The loss of each step was not measured.")
    lines = _each_and_smooth(raw) if raw else []
    said = f"The training loss went from {number(report.loss.first)} to {number(report.loss.last)}"
    said += f" (lowest {number(report.loss.lowest)}) in {report.steps:,} step{'' if report.steps == 1 else 's'}."
    if held_out:
        lines.append(_Line("held-out rows", held_out, "c2", ":", 1.2, "D"))
        said += f" The held-out loss was {number(held_out[0][1])} at step {held_out[0][0]:,.0f}"
        said += f" and {number(held_out[-1][1])} at step {held_out[-1][0]:,.0f}." if len(held_out) > 1 else "."
    else:
        said += " The held-out loss was not measured."
    return Picture(
        "loss",
        title,
        said,
        _curves("loss", lines, unit="nats a token"),
        220,
        tuple(line.key for line in lines),
        ("Step", "Loss", "Learning rate", "Gradient norm"),
        _table(report.loss.history, number, "{:.3g}".format, number),
        len(report.loss.history),
    )


def _by_step(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """One evaluation a step, in order: the one after the training is often also the last within it."""
    return [found for _, found in sorted({e.step: e for e in evaluations}.items())]


def learning_rate(report: Report) -> Picture:
    points = _finite((step, rate) for step, _, rate, _ in report.loss.history)
    if not points:
        return Picture("rate", "Learning rate", "The learning rate was not measured.")
    rates = [rate for _, rate in points]
    power = math.floor(math.log10(max(rates))) if max(rates) > 0 else 0
    scaled = _Line("", [(step, rate / 10.0**power) for step, rate in points])
    unit = "" if power in (0, 1) else f"in 1e{power}"
    said = f"It began at {rates[0]:.3g}, was {max(rates):.3g} at most and ended at {rates[-1]:.3g}."
    svg = _curves("rate", [scaled], unit=unit, from_zero=True)
    rows = _table(points, "{:.3g}".format)
    return Picture("rate", "Learning rate", said, svg, 220, (), ("Step", "Learning rate"), rows, len(points))


def throughput(report: Report) -> Picture:
    points = _finite(report.throughput.history)
    title = "Throughput"
    if not points:
        return Picture("throughput", title, "The throughput of each step was not measured.")
    mean = report.throughput.tokens_per_second
    lines = _each_and_smooth(points)
    said = f"{mean:,.0f} tokens a second, padding aside; a step took {report.throughput.step_seconds_p50:.3g} s"
    return Picture(
        "throughput",
        title,
        f"{said} at the median and {report.throughput.step_seconds_p95:.3g} s at the 95th percentile.",
        _curves("throughput", lines, unit="tokens/s", from_zero=True),
        220,
        tuple(line.key for line in lines),
        ("Step", "Tokens/s"),
        _table(report.throughput.history, number),
        len(report.throughput.history),
    )


def memory(report: Report) -> Picture:
    """The parts of the largest memory so far, and what a step left behind."""
    held, history = report.memory, report.memory.history
    on_gpu = held.peak_gpu_bytes > 0
    title = f"Memory of the {'GPU' if on_gpu else 'process'}"
    if not history:
        return Picture("memory", title, "The memory over the steps was not measured.")
    peak = max(high for _, _, high in history)
    parts = {name.replace("_", " "): count for name, count in held.components.model_dump().items()}
    top = parts.pop("activations")
    rest = max((held.peak_gpu_bytes if on_gpu else held.peak_host_bytes) - sum(parts.values()) - top, 0)
    if rest > peak / 100:
        parts = {"the rest of the process": rest} | parts
    limit = held.device_bytes if held.device_bytes <= 2 * peak else None
    unit, divisor = _byte_unit(limit or peak)
    xs = [step for step, *_ in history]
    tops = _thin([(step, high / divisor) for step, _, high in history])
    left_behind = _thin([(step, now / divisor) for step, now, _ in history])
    if len(history) == 1:
        tops, left_behind = ([(xs[0] + d, y) for d in (-0.5, 0.5) for _, y in line] for line in (tops, left_behind))
    colours = ("c6", "c3", "c4", "c5", "c2")[-len(parts) :]

    def paint(axes: Axes) -> None:
        floor = [0.0] * len(tops)
        steps = [step for step, _ in tops]
        for count, colour in zip((*parts.values(), math.inf), (*colours, "c1"), strict=True):
            ceiling = [min(low + count / divisor, high) for low, (_, high) in zip(floor, tops, strict=True)]
            axes.fill_between(steps, floor, ceiling, color=COLOUR[colour], alpha=0.8, linewidth=0)
            floor = ceiling
        axes.plot(steps, [high for _, high in tops], color=COLOUR["ink"], linewidth=1.6)
        axes.plot(*zip(*left_behind, strict=True), "--", color=COLOUR["ink"], linewidth=1.2)
        if limit:
            axes.axhline(limit / divisor, color=COLOUR["ink"], linewidth=1.6, linestyle=":")
        axes.set_xlim(steps[0], steps[-1])
        axes.set_ylim(0, (limit or peak) / divisor * 1.08 or 1)
        _axis(axes, unit=unit, below="step")

    key = [("solid ink", f"largest so far: {size(peak)}"), ("dashed ink", f"after a step: {size(history[-1][1])}")]
    key += [("area c1", f"activations: {size(top)}")]
    key += [(f"area {c}", f"{n}: {size(b)}") for (n, b), c in reversed([*zip(parts.items(), colours, strict=True)])]
    said = f"At most {size(peak)} were held, {size(top)} of them activations and workspace, "
    said += f"{size(held.components.base_weights)} base weights. "
    if limit:
        key.insert(0, ("dashdot ink", f"the device's limit: {size(limit)}"))
        said += f"The device has {size(limit)}."
    else:
        said += f"The device has {size(held.device_bytes)}, which is beyond the picture."
    rows = _table(history, size, size)
    head = ("Step", "After it", "Largest so far")
    svg = _draw("memory", 240, paint)
    return Picture("memory", title, said, svg, 240, tuple(key), head, rows, len(history))


def _byte_unit(most: float) -> tuple[str, int]:
    power = max((i for i in range(5) if most >= 1024**i), default=0)
    return ("B", "KiB", "MiB", "GiB", "TiB")[power], 1024**power


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

    listed = [f"{name} {share:.1%}" for name, share in shares.items()]
    rows = tuple((name, f"{share:.2%}") for name, share in shares.items())
    said = f"Shares of the time of the steps: {', '.join(listed)}."
    svg = _draw("phases", 150, paint, left=4, right=4, top=4, bottom=4)
    return Picture("phases", "Where the time went", said, svg, 150, (), ("Phase", "Share"), rows)


def lengths(report: Report) -> Picture:
    bins = [(end, rows) for end, rows in report.lengths]
    title = "Length of the training rows"
    if not bins:
        return Picture("lengths", title, "The lengths of the rows were not measured.")
    starts = [0, *(end for end, _ in bins[:-1])]
    total = sum(rows for _, rows in bins)
    fullest = max(range(len(bins)), key=lambda i: bins[i][1])

    def paint(axes: Axes) -> None:
        widths = [end - start for start, (end, _) in zip(starts, bins, strict=True)]
        axes.bar(starts, [rows for _, rows in bins], [0.88 * w for w in widths], align="edge", color=COLOUR["c1"])
        axes.set_xlim(0, bins[-1][0])
        axes.margins(y=0.08)
        _axis(axes, unit="rows", below="tokens")

    said = f"{total:,} rows of at most {bins[-1][0]:,} tokens; most, {bins[fullest][1]:,}, have {starts[fullest] + 1:,}"
    rows = tuple(
        (f"{start + 1:,} to {end:,}", f"{count:,}") for start, (end, count) in zip(starts, bins, strict=True)
    )  # fmt: skip
    svg = _draw("lengths", 220, paint)
    said += f" to {bins[fullest][0]:,}."
    return Picture("lengths", title, said, svg, 220, (), ("Tokens", "Rows"), rows)


# ------------------------------------------------------------------------------------------------------- of evaluation


KEY = (("dots c1", "a target, with its 95% interval"), ("dots c2", "the reference"))


def quality(targets: Sequence[TargetResult], reference: str | None) -> Picture:
    """Perplexity against bytes, a name for each point."""
    title = "Quality against size"
    drawn = sorted((t for t in targets if _has_perplexity(t)), key=lambda t: -t.perplexity)
    if not drawn:
        return Picture("quality", title, "The perplexity was not measured.")
    unit, divisor = _byte_unit(max(t.weight_bytes for t in drawn))
    low = min(min(t.perplexity_interval.low, t.perplexity) for t in drawn)
    high = max(max(t.perplexity_interval.high, t.perplexity) for t in drawn)
    is_log = high > 10 * low > 0  # a target that quantizing broke would flatten the others
    scale = math.log10 if is_log else float
    low, high = scale(low), scale(high)
    margin = (high - low) * 0.08 or abs(high) * 0.05 or 1
    low, high = low - margin, high + margin
    most = max(t.weight_bytes for t in drawn) / divisor * 1.08 or 1
    names = [shorten(t.name, 20) for t in drawn]
    height = max(280, 84 + 16 * len(drawn))
    left, top, bottom = 50.0, 24.0, 40.0

    def places(right: float) -> list[Point]:
        wide, tall = WIDTH - left - right, height - top - bottom
        return [
            (left + t.weight_bytes / divisor / most * wide, bottom + (scale(t.perplexity) - low) / (high - low) * tall)
            for t in drawn
        ]

    beside = _beside(places(20), names, left)
    right = 20 if beside else min(max(map(_wide, names)), 144) + 30

    def paint(axes: Axes) -> None:
        for t in drawn:
            x, span = t.weight_bytes / divisor, t.perplexity_interval
            colour, marker = (COLOUR["c2"], "D") if t.name == reference else (COLOUR["c1"], "o")
            axes.plot([x, x], [scale(span.low), scale(span.high)], color=colour, linewidth=1.4, alpha=0.8)
            axes.plot(x, scale(t.perplexity), marker, color=colour, markersize=7, markeredgecolor=COLOUR["card"])
        axes.set(xlim=(0, most), ylim=(low, high))
        _axis(axes, unit=f"perplexity{', log scale' * is_log}", below=f"{unit} of weights", whole=False)
        if is_log:
            axes.yaxis.set_major_formatter(lambda value, _: _tick(float(f"{10.0**value:.2g}")))
        ends = beside or _column(places(right), WIDTH - right + 24, bottom, height - 8)
        for text, (x, y), point in zip(names, ends, places(right), strict=True):
            axes.annotate(text, (x, y - 4), xycoords="figure pixels", annotation_clip=False)
            if not beside:
                along = [(point[0] + 5, point[1]), (WIDTH - right + 4, point[1]), (x - 4, y)]
                xs, ys = zip(*(axes.transAxes.inverted().transform(at) for at in along), strict=True)
                axes.plot(xs, ys, color=COLOUR["muted"], linewidth=0.5, transform=axes.transAxes, clip_on=False)

    best, smallest = drawn[-1], min(drawn, key=lambda t: (t.weight_bytes, t.perplexity))
    said = f"The lowest perplexity, {number(best.perplexity)}, has {plain(best.name)} at {size(best.weight_bytes)}; "
    said += f"the fewest bytes, {size(smallest.weight_bytes)}, {plain(smallest.name)} at {number(smallest.perplexity)}."
    if missing := len(targets) - len(drawn):
        said += f" For {missing} of {len(targets)} targets it is not finite."
    key = KEY[: 2 if any(t.name == reference for t in drawn) else 1]
    rows = tuple(
        (plain(t.name), size(t.weight_bytes), number(t.perplexity), interval(t.perplexity_interval)) for t in drawn
    )
    svg = _draw("quality", height, paint, right=right)
    head = ("Target", "Weights", "Perplexity", "95% interval")
    return Picture("quality", title, said, svg, height, key, head, rows)


def _has_perplexity(target: TargetResult) -> bool:
    span = target.perplexity_interval
    return all(map(math.isfinite, (target.perplexity, span.low, span.high)))


def _beside(points: Sequence[Point], names: Sequence[str], left: float) -> list[Point] | None:
    """Where each name stands at once right or left of its point; None if they have no room there."""
    taken = [(x - 6, y - 7, x + 6, y + 7) for x, y in points]
    ends = []
    for (x, y), name in zip(points, names, strict=True):
        wide = _wide(name)
        free = [
            box
            for start in (x + 9, x - 9 - wide)
            if not any(_meet(box := (start, y - 7, start + wide, y + 7), other) for other in taken)
            and left < start < WIDTH - wide
        ]
        if not free:
            return None
        taken.append(free[0])
        ends.append((free[0][0], y))
    return ends


def _column(points: Sequence[Point], x: float, bottom: float, top: float, line: float = 16) -> list[Point]:
    """Where the names stand in a column, from the top down as the points are, as near to their heights as they can."""
    blocks: list[list[float]] = []  # of names that touch: how high the first would be, once for each
    for i, (_, y) in enumerate(points):
        blocks.append([y + i * line])
        while len(blocks) > 1 and statistics.fmean(blocks[-2]) < statistics.fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    firsts = [statistics.fmean(block) for block in blocks for _ in block]
    lowest = bottom + (len(points) - 1) * line
    return [(x, min(max(first, lowest), top) - i * line) for i, first in enumerate(firsts)]


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def interval(score: Score, show: Callable[[float], str] = number) -> str:
    return f"{show(score.low)} to {show(score.high)}"


def scores(name: str, metric: str, targets: Sequence[TargetResult], reference: str | None) -> Picture:
    """One metric: a row a target, its score as a point on its interval."""
    measured = [(t.name, t.scores[metric]) for t in targets if metric in t.scores]
    height = 44 + 40 * len(measured)

    def paint(axes: Axes) -> None:
        ends = [value for _, s in measured for value in (s.low, s.value, s.high)]
        low, high = min(ends), max(ends)
        margin = (high - low) * 0.08 or 0.05
        for i, (target, score) in enumerate(measured):
            colour, marker = (COLOUR["c2"], "D") if target == reference else (COLOUR["c1"], "o")
            axes.plot([score.low, score.high], [i, i], color=colour, linewidth=2.4, alpha=0.8)
            axes.plot(score.value, i, marker, color=colour, markersize=7, markeredgecolor=COLOUR["card"])
            across = axes.get_yaxis_transform()
            axes.annotate(shorten(target, 36), (0, i), (0, 9), across, "offset points", annotation_clip=False)
            axes.annotate(percent(score.value), (1, i), (0, 9), across, "offset points", ha="right")
        axes.set(ylim=(len(measured) - 0.6, -0.75))
        axes.set_xlim(max(low - margin, min(low, 0) - 0.02), min(high + margin, max(high, 1) + 0.02))
        _axis(axes, whole=False)
        axes.xaxis.set_major_formatter(lambda value, _: f"{round(100 * value, 6):g}%")
        axes.set_yticks([])
        axes.grid(axis="x")

    title = plain(metric).replace("_", " ").capitalize()
    best = max(measured, key=lambda pair: pair[1].value)
    said = f"{title} is highest, {percent(best[1].value)}, for {plain(best[0])}"
    said += f" (95% interval {interval(best[1], percent)})."
    missing = len(targets) - len(measured)
    said += f" For {missing} of {len(targets)} targets it was not measured." if missing else ""
    rows = tuple((plain(target), percent(score.value), interval(score, percent)) for target, score in measured)
    key = KEY[: 2 if any(target == reference for target, _ in measured) else 1]
    svg = _draw(name, height, paint, left=8, right=8, top=6, bottom=30)
    return Picture(name, title, said, svg, height, key, ("Target", title, "95% interval"), rows)


def levels(targets: Iterable[TargetResult]) -> list[float]:
    """Edges of the steps of colour, in decibels: round, and the same for all targets. Empty without layers."""
    from matplotlib.ticker import MaxNLocator

    found = [x.output_snr_db for t in targets for x in t.layers if math.isfinite(x.output_snr_db)]
    if not found:
        return []
    low = math.floor(min(found))
    edges = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, max(max(found), low + 1))
    return [float(edge) for edge in edges]


def grid(found: Iterable[LayerError]) -> dict[tuple[str, int], float]:
    """The output SNR by kind of projection and block; the lowest where a block has several of a kind."""
    cells: dict[tuple[str, int], float] = {}
    for layer in found:
        if layer.block is not None and math.isfinite(layer.output_snr_db):
            at = layer.kind.rpartition(".")[2], layer.block
            cells[at] = min(cells.get(at, math.inf), layer.output_snr_db)
    return cells


def layers(name: str, target: TargetResult, edges: Sequence[float]) -> Picture:
    """Blocks from left to right, kinds of projection from top to bottom, coloured by the output SNR."""
    cells = grid(target.layers)
    title = plain(target.name)
    if not cells:
        return Picture(name, title, "The layers within the blocks were not measured.")
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    first, last = min(block for _, block in cells), max(block for _, block in cells)
    height = 48 + 18 * len(kinds)
    level = {at: _level(snr, edges) for at, snr in cells.items()}
    every = {(kind, block) for kind in kinds for block in range(first, last + 1)}

    def paint(axes: Axes) -> None:
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path

        for step in sorted(set(level.values())):
            corners = [(block, kinds.index(kind)) for (kind, block), own in level.items() if own == step]
            path = Path.make_compound_path(*(Path(_square(*at), closed=True) for at in corners))
            axes.add_patch(PathPatch(path, facecolor=COLOUR[_shade(step, edges)], linewidth=0))
        for kind, block in sorted(every - set(cells)):
            axes.plot(block, kinds.index(kind), "x", color=COLOUR["muted"], markersize=3, markeredgewidth=0.8)
        _axis(axes, below="block")
        axes.set(xlim=(first - 0.5, last + 0.5), ylim=(len(kinds) - 0.5, -0.5))
        axes.set_yticks(range(len(kinds)), [shorten(kind, 14) for kind in kinds])
        axes.grid(visible=False)

    worst = min(cells, key=lambda at: cells[at])
    middle = statistics.median(cells.values())
    said = f"The output's SNR is {middle:.1f} dB at the median of {len(cells):,} layers, "
    said += f"and lowest, {cells[worst]:.1f} dB, in {plain(worst[0])} of block {worst[1]}."
    key = [(f"cell {_shade(i, edges)}", f"{low:g} to {high:g} dB") for i, (low, high) in enumerate(pairwise(edges))]
    if every - set(cells):
        key.append(("cross", "not measured"))
    rows = tuple(
        (str(block), *(f"{cells[kind, block]:.1f}" if (kind, block) in cells else "not measured" for kind in kinds))
        for block in range(first, last + 1)
    )  # fmt: skip
    left = min(14 + max(_wide(shorten(kind, 14)) for kind in kinds), 110)
    svg = _draw(name, height, paint, left=left, top=6)
    return Picture(name, title, said, svg, height, tuple(key), ("Block", *map(plain, kinds)), rows)


def _level(snr: float, edges: Sequence[float]) -> int:
    return min(max(sum(snr >= edge for edge in edges), 1), len(edges) - 1) - 1


def _shade(level: int, edges: Sequence[float]) -> str:
    """Of the eight shades, from the strongest for the lowest level."""
    return f"h{round(7 * level / (len(edges) - 2)) if len(edges) > 2 else 4}"


def _square(x: float, y: float) -> list[Point]:
    return [(x + 0.46 * a, y + 0.46 * b) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1))]
