"""How pictures are drawn: matplotlib's SVG, in the colours and the font of the page around it."""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 360
"""Units of every picture: it is as readable on a phone as beside another one on a wide screen."""
POINTS = 600
"""Most points of a line."""

# matplotlib is given colours that stand for a role, and `_adopt` puts the page's variable in their place.
ROLES = ("ink", "muted", "line", "card", *(f"c{i}" for i in range(1, 7)), *(f"h{i}" for i in range(8)))
COLOUR = {role: f"#0101{i + 1:02x}" for i, role in enumerate(ROLES)}
VARIABLES = {colour: f"var(--{role})" for role, colour in COLOUR.items()} | {COLOUR["ink"]: "currentColor"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "path.simplify": False,  # `thin` did it
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # only for where text goes: the page's font is what the reader sees
    "font.size": 12,
    "text.color": COLOUR["ink"],
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), COLOUR["muted"]),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": COLOUR["line"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}
LEFT, RIGHT, TOP, BOTTOM = MARGINS = (50.0, 20.0, 24.0, 40.0)
"""Units around the axes."""
Paint = Callable[["Axes"], None]
Point = tuple[float, float]
Cell = str | None
"""What was measured; None if it was not."""
T = TypeVar("T")


class Table(NamedTuple):
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    measured: int = 0
    """Rows there are in all, where `rows` are a selection."""


@dataclass(frozen=True)
class Picture:
    """A picture, what it says in a sentence, and its figures."""

    name: str
    """Unique on its page."""
    title: str
    sentence: str
    paint: Paint | None = None
    """None where there was nothing to draw."""
    table: Table | None = None
    key: Sequence[tuple[str, str]] = ()
    """[look, what has it]; a look is two of the page's classes."""
    height: float = 220
    """Units, as are the margins: left, right, top and bottom."""
    margins: tuple[float, float, float, float] = MARGINS

    @property
    def svg(self) -> Markup:
        """What goes into its svg element."""
        return _draw(self, self.paint) if self.paint else Markup()


@dataclass(frozen=True)
class Line:
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


def _draw(picture: Picture, paint: Paint) -> Markup:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    height, (left, right, top, bottom) = picture.height, picture.margins
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE | {"svg.hashsalt": picture.name})  # its ids are its own, and the same each time
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's fonts draw the text
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        box = (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, (height - top - bottom) / height)
        paint(figure.add_axes(box))
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _adopt(out.getvalue())


def _adopt(svg: str) -> Markup:
    """The elements within a standalone SVG, fit to stand in a page: with its colours and its font, and without
    ids that nothing uses, which all pictures have in common."""
    root = ET.fromstring(svg)  # noqa: S314  (matplotlib wrote it a moment ago)
    used = set(re.findall(r"#([\w-]+)", " ".join(value for node in root.iter() for value in node.attrib.values())))
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        found = {key.rpartition("}")[2]: value for key, value in node.attrib.items()}
        node.attrib = {key: _adopted(key, value) for key, value in found.items() if key != "id" or value in used}
        for child in [child for child in node if child.tag.endswith(("}style", "}metadata"))]:
            node.remove(child)
        node.text, node.tail = (part if part and part.strip() else None for part in (node.text, node.tail))
    return Markup("".join(ET.tostring(child, encoding="unicode") for child in root))  # noqa: S704  (it escapes)


def _adopted(key: str, value: str) -> str:
    """The value of an attribute as the page has it."""
    if key == "style":
        value = re.sub(r"#0101[0-9a-f]{2}", lambda match: VARIABLES[match[0]], value)
        return re.sub(r"font-family: [^;]*;? ?", "", value)
    if key in ("d", "x", "y", "transform", "width", "height"):
        value = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), value)
        return " ".join(value.split())
    return value


def tick(value: float, _: object = None) -> str:
    for limit, divisor, unit in ((1e9, 1.0, ""), (1e6, 1e6, "M"), (1e5, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / divisor:.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{round(value, 10):g}"


def axis(axes: Axes, *, unit: str = "", below: str = "", whole: bool = True) -> None:
    """Round numbers at both axes, and what they count: above the one, below the other."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(tick))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(tick))
    axes.set_xlabel(below, loc="right")
    axes.annotate(unit, (0, 1), (-46, 10), "axes fraction", "offset points", color=COLOUR["muted"])


def curves(lines: Sequence[Line], *, unit: str, from_zero: bool = False) -> Paint:
    """Lines over the steps."""

    def paint(axes: Axes) -> None:
        for line in lines:
            points = thin(line.points)
            marker = line.marker or ("o" if len(points) == 1 else "")
            (drawn,) = axes.plot(*zip(*points, strict=True), line.style, color=COLOUR[line.colour], marker=marker)
            drawn.set(linewidth=line.width, markeredgecolor=COLOUR["card"])
        axes.margins(0.02, 0.08)
        steps = {x for line in lines for x, _ in line.points}
        if len(steps) == 1:
            axes.set_xlim(min(steps) - 1, max(steps) + 1)
        low, high = axes.get_ylim()
        if from_zero or 0 < low < high / 4:
            axes.set_ylim(bottom=0)
        axis(axes, unit=unit, below="step")

    return paint


def finite(points: Iterable[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def thin(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """At most `most` of the points: the lowest and the highest of equal stretches, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    kept, stretches = [], most // 2
    for i in range(stretches):
        part = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def each_and_smooth(points: Sequence[Point]) -> list[Line]:
    """The points, and where they are many the mean over the steps around each: one in twenty, less at the ends."""
    if len(points) < 8:
        return [Line("each step", points)] if points else []
    reach = max(len(points) // 40, 1)
    sums = [0.0, *accumulate(y for _, y in points)]
    means = [
        (x, (sums[i + near + 1] - sums[i - near]) / (2 * near + 1))
        for i, (x, _) in enumerate(points)
        for near in [min(reach, i, len(points) - 1 - i)]
    ]
    return [Line("each step", points, "c6", width=0.9), Line(f"mean over {2 * reach + 1:,} steps", means)]


def evenly(rows: Sequence[T], most: int = 25) -> list[T]:
    """At most `most` rows, equally far from each other, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]
