"""The pictures of an evaluation."""

from __future__ import annotations

import math
import statistics
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from qft.documents.evaluation import LayerError, Score, TargetResult
from qft.views.html.chart import BOTTOM, COLOUR, LEFT, RIGHT, WIDTH, Cell, Picture, Point, Table, axis, tick
from qft.views.words import binary_unit, number, percent, plain, shorten, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""
Place = tuple[str, int]
"""A kind of projection, and the block that it is of."""


def interval(score: Score, show: Callable[[float], str] = number) -> str:
    return f"{show(score.low)} to {show(score.high)}"


def _look(name: str, reference: str | None) -> tuple[str, str]:
    """Colour and marker of a target."""
    return (COLOUR["c2"], "D") if name == reference else (COLOUR["c1"], "o")


def _key(names: Collection[str], reference: str | None) -> list[tuple[str, str]]:
    both = [("dots c1", "a target, with its 95% interval"), ("dots c2", "the reference")]
    return both if reference in names else both[:1]


def headline(targets: Sequence[TargetResult], reference: str | None) -> Iterator[tuple[str, Cell, str]]:
    """[what, figure, more about it]."""
    if not targets:
        yield "Targets", None, ""
        return
    likely = [(t.perplexity, t.name) for t in targets if t.perplexity is not None]
    perplexity, best = min(likely, default=(None, ""))
    yield "Lowest perplexity", None if perplexity is None else number(perplexity), best
    sizes = [(t.weight_bytes, t.perplexity or 0.0, t.name) for t in targets if t.weight_bytes is not None]
    count, _, small = min(sizes, default=(None, 0.0, ""))
    yield "Weights, fewest bytes", None if count is None else size(count), small
    speeds = [(t.decode_tokens_per_second, t.name) for t in targets if t.decode_tokens_per_second is not None]
    speed, fast = max(speeds, default=(None, ""))
    yield "Tokens/s when writing, most", None if speed is None else number(speed), fast
    distances = [(t.kl_mean, t.name) for t in targets if t.kl_mean is not None and t.name != reference]
    kl, nearest = min(distances, key=lambda pair: pair[0], default=(None, ""))
    yield "KL from the reference, least", None if kl is None else number(kl), nearest


class _Sized(NamedTuple):
    """A target of which perplexity and bytes are known."""

    name: str
    bytes: int
    perplexity: float
    span: Score


def quality(targets: Sequence[TargetResult], reference: str | None) -> Picture:
    """Perplexity against bytes, a name for each point."""
    drawn = sorted((one for t in targets if (one := _sized(t))), key=lambda one: -one.perplexity)
    if not drawn:
        return Picture("quality", "Quality against size", "The perplexity was not measured.")
    best, smallest = drawn[-1], min(drawn, key=lambda one: (one.bytes, one.perplexity))
    said = f"The lowest perplexity, {number(best.perplexity)}, has {plain(best.name)} at {size(best.bytes)}; "
    said += f"the fewest bytes, {size(smallest.bytes)}, {plain(smallest.name)} at {number(smallest.perplexity)}."
    if missing := len(targets) - len(drawn):
        said += f" For {missing} of {len(targets)} targets it is not finite, or not known."
    rows = [(one.name, size(one.bytes), number(one.perplexity), interval(one.span)) for one in drawn]
    paint = partial(_paint_quality, drawn=drawn, reference=reference)
    table = Table(("Target", "Weights", "Perplexity", "95% interval"), rows)
    key = _key([one.name for one in drawn], reference)
    return Picture("quality", "Quality against size", said, paint, table, key, max(280, 84 + 16 * len(drawn)))


def _sized(target: TargetResult) -> _Sized | None:
    perplexity, span, count = target.perplexity, target.perplexity_interval, target.weight_bytes
    if perplexity is None or span is None or count is None:
        return None
    is_finite = all(map(math.isfinite, (perplexity, span.low, span.high)))
    return _Sized(target.name, count, perplexity, span) if is_finite else None


def _paint_quality(axes: Axes, drawn: Sequence[_Sized], reference: str | None) -> None:
    most = max(one.bytes for one in drawn)
    unit, divisor = binary_unit(most)
    spans = {one.name: (one.span.low, one.perplexity, one.span.high) for one in drawn}
    low, high = min(map(min, spans.values())), max(map(max, spans.values()))
    is_log = high > 10 * low > 0  # a target that quantizing broke would flatten the others
    scale: Callable[[float], float] = math.log10 if is_log else float
    margin = (scale(high) - scale(low)) * 0.08 or abs(scale(high)) * 0.05 or 1
    axes.set(xlim=(0, most / divisor * 1.08 or 1), ylim=(scale(low) - margin, scale(high) + margin))
    axis(axes, unit=f"perplexity{', log scale' * is_log}", below=f"{unit} of weights", whole=False)
    if is_log:
        axes.yaxis.set_major_formatter(lambda value, _: tick(float(f"{10.0**value:.2g}")))
    points = [(one.bytes / divisor, *map(scale, spans[one.name])) for one in drawn]
    for one, (x, bottom, y, top) in zip(drawn, points, strict=True):
        colour, marker = _look(one.name, reference)
        axes.plot([x, x], [bottom, top], color=colour, linewidth=1.4, alpha=0.8)
        axes.plot(x, y, marker, color=colour, markersize=7, markeredgecolor=COLOUR["card"])
    _name(axes, [(x, y) for x, _, y, _ in points], [shorten(one.name, 20) for one in drawn])


def _name(axes: Axes, points: Sequence[Point], names: Sequence[str]) -> None:
    """The names beside their points, or else in a column, each with a line from its point."""
    ends = _beside(axes.transData.transform(points).tolist(), names)
    if not ends:
        edge, box = WIDTH - min(max(map(_width_of, names)), 144) - 30, axes.get_position()
        axes.set_position((box.x0, box.y0, edge / WIDTH - box.x0, box.height))
        places = axes.transData.transform(points).tolist()
        ends = _column(places, edge + 24, axes.figure.bbox.height - 8)
        for (x, y), (from_x, from_y) in zip(ends, places, strict=True):
            along = axes.transAxes.inverted().transform([(from_x + 5, from_y), (edge + 4, from_y), (x - 4, y)])
            axes.plot(*along.T, color=COLOUR["muted"], linewidth=0.5, transform=axes.transAxes, clip_on=False)
    for name, (x, y) in zip(names, ends, strict=True):
        axes.annotate(name, (x, y - 4), xycoords="figure pixels", annotation_clip=False)


def _width_of(text: str) -> float:
    """Units that a line of text takes, or a little more."""
    return 12 * sum(1 if unicodedata.east_asian_width(c) in "WF" else 0.57 for c in text)


def _beside(points: Sequence[Point], names: Sequence[str]) -> list[Point]:
    """Where each name stands at once right or left of its point; nothing if they have no room there."""
    taken = [(x - 6, y - 7, x + 6, y + 7) for x, y in points]
    ends = []
    for (x, y), name in zip(points, names, strict=True):
        wide = _width_of(name)
        boxes = [(start, y - 7, start + wide, y + 7) for start in (x + 9, x - 9 - wide) if LEFT < start < WIDTH - wide]
        free = [box for box in boxes if not any(_meet(box, other) for other in taken)]
        if not free:
            return []
        taken.append(free[0])
        ends.append((free[0][0], y))
    return ends


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _column(points: Sequence[Point], x: float, top: float, line: float = 16) -> list[Point]:
    """Where the names stand in a column, from the top down as the points are, as near to their heights as they can."""
    blocks: list[list[float]] = []  # of names that touch: how high the first would be, once for each
    for i, (_, y) in enumerate(points):
        blocks.append([y + i * line])
        while len(blocks) > 1 and statistics.fmean(blocks[-2]) < statistics.fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    firsts = [statistics.fmean(block) for block in blocks for _ in block]
    lowest = BOTTOM + (len(points) - 1) * line
    return [(x, min(max(first, lowest), top) - i * line) for i, first in enumerate(firsts)]


def scores(name: str, metric: str, targets: Sequence[TargetResult], reference: str | None) -> Picture:
    """One metric: a row a target, its score as a point on its interval."""
    measured = {t.name: t.scores[metric] for t in targets if metric in t.scores}
    title = plain(metric).replace("_", " ").capitalize()
    best, highest = max(measured.items(), key=lambda pair: pair[1].value)
    said = f"{title} is highest, {percent(highest.value)}, for {plain(best)}"
    said += f" (95% interval {interval(highest, percent)})."
    if missing := len(targets) - len(measured):
        said += f" For {missing} of {len(targets)} targets it was not measured."
    rows = [(target, percent(score.value), interval(score, percent)) for target, score in measured.items()]
    paint = partial(_paint_scores, measured=measured, reference=reference)
    table, height = Table(("Target", title, "95% interval"), rows), 44 + 40 * len(measured)
    return Picture(name, title, said, paint, table, _key(measured, reference), height, (8, 8, 6, 30))


def _paint_scores(axes: Axes, measured: dict[str, Score], reference: str | None) -> None:
    ends = [value for s in measured.values() for value in (s.low, s.value, s.high)]
    low, high = min(ends), max(ends)
    margin = (high - low) * 0.08 or 0.05
    across = axes.get_yaxis_transform()
    for i, (target, score) in enumerate(measured.items()):
        colour, marker = _look(target, reference)
        axes.plot([score.low, score.high], [i, i], color=colour, linewidth=2.4, alpha=0.8)
        axes.plot(score.value, i, marker, color=colour, markersize=7, markeredgecolor=COLOUR["card"])
        axes.annotate(shorten(target, 36), (0, i), (0, 9), across, "offset points", annotation_clip=False)
        axes.annotate(percent(score.value), (1, i), (0, 9), across, "offset points", ha="right")
    axes.set(ylim=(len(measured) - 0.6, -0.75))
    axes.set_xlim(max(low - margin, min(low, 0) - 0.02), min(high + margin, max(high, 1) + 0.02))
    axis(axes, whole=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{round(100 * value, 6):g}%")
    axes.set_yticks([])
    axes.grid(axis="x")


def levels(targets: Iterable[TargetResult]) -> list[float]:
    """Edges of the steps of colour, in decibels: round, and the same for all targets. Empty without layers."""
    from matplotlib.ticker import MaxNLocator

    found = [x.output_snr_db for t in targets for x in t.layers if math.isfinite(x.output_snr_db)]
    if not found:
        return []
    low = math.floor(min(found))
    edges = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, max(max(found), low + 1))
    return [float(edge) for edge in edges]


def layers(name: str, target: TargetResult, edges: Sequence[float]) -> Picture:
    """Blocks from left to right, kinds of projection from top to bottom, coloured by the output SNR."""
    cells = _grid(target.layers)
    title = plain(target.name)
    if not cells:
        return Picture(name, title, "The layers within the blocks were not measured.")
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = range(min(block for _, block in cells), max(block for _, block in cells) + 1)
    kind, block = min(cells, key=lambda cell: cells[cell])
    key = [(f"cell {_shade(i, edges)}", f"{low:g} to {high:g} dB") for i, (low, high) in enumerate(pairwise(edges))]
    if len(cells) < len(kinds) * len(blocks):
        key.append(("cross", "not measured"))
    rows = [(str(b), *(f"{cells[k, b]:.1f}" if (k, b) in cells else None for k in kinds)) for b in blocks]
    said = f"The output's SNR is {statistics.median(cells.values()):.1f} dB at the median of {len(cells):,} layers, "
    said += f"and lowest, {cells[kind, block]:.1f} dB, in {plain(kind)} of block {block}."
    paint = partial(_paint_layers, cells=cells, kinds=kinds, blocks=blocks, edges=edges)
    table, height = Table(("Block", *kinds), rows), 48 + 18 * len(kinds)
    left = min(14 + max(_width_of(shorten(kind, 14)) for kind in kinds), 110)
    return Picture(name, title, said, paint, table, key, height, (left, RIGHT, 6, BOTTOM))


def _grid(found: Iterable[LayerError]) -> dict[Place, float]:
    """The output SNR by kind of projection and block; the lowest where a block has several of a kind."""
    cells: dict[Place, float] = {}
    for layer in found:
        if layer.block is not None and math.isfinite(layer.output_snr_db):
            at = layer.kind.rpartition(".")[2], layer.block
            cells[at] = min(cells.get(at, math.inf), layer.output_snr_db)
    return cells


def _paint_layers(
    axes: Axes, cells: dict[Place, float], kinds: Sequence[str], blocks: range, edges: Sequence[float]
) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    level = {cell: _level(snr, edges) for cell, snr in cells.items()}
    for step in sorted(set(level.values())):
        corners = [_square(block, kinds.index(kind)) for (kind, block), own in level.items() if own == step]
        path = Path.make_compound_path(*(Path(square, closed=True) for square in corners))
        axes.add_patch(PathPatch(path, facecolor=COLOUR[_shade(step, edges)], linewidth=0))
    for kind, block in sorted({(kind, block) for kind in kinds for block in blocks} - set(cells)):
        axes.plot(block, kinds.index(kind), "x", color=COLOUR["muted"], markersize=3, markeredgewidth=0.8)
    axis(axes, below="block")
    axes.set(xlim=(blocks[0] - 0.5, blocks[-1] + 0.5), ylim=(len(kinds) - 0.5, -0.5))
    axes.set_yticks(range(len(kinds)), [shorten(kind, 14) for kind in kinds])
    axes.grid(visible=False)


def _level(snr: float, edges: Sequence[float]) -> int:
    return min(max(sum(snr >= edge for edge in edges), 1), len(edges) - 1) - 1


def _shade(level: int, edges: Sequence[float]) -> str:
    """Of the eight shades, from the strongest for the lowest level."""
    return f"h{round(7 * level / (len(edges) - 2)) if len(edges) > 2 else 4}"


def _square(x: float, y: float) -> list[Point]:
    return [(x + 0.46 * a, y + 0.46 * b) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1))]
