"""Figures and texts as people read them: sizes, counts, shares, and curves of one line."""

import json
import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
CONTROLS |= {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)
"""What to show for the characters by which a text could command a terminal."""

BARS = "▁▂▃▄▅▆▇█"


def binary_unit(most: float) -> tuple[str, int]:
    """The largest unit of which there is one or more, and its bytes."""
    power = max((i for i in range(5) if most >= 1024**i), default=0)
    return ("B", "KiB", "MiB", "GiB", "TiB")[power], 1024**power


def size(count: float) -> str:
    """Bytes with a binary unit."""
    unit, divisor = binary_unit(abs(count))
    return f"{count / divisor:.{1 if divisor > 1 else 0}f} {unit}"


def si(count: float) -> str:
    """A count with k, M or B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(count) >= limit:
            return f"{count / limit * (10 if unit == 'k' else 1):.1f}{unit}"
    return f"{count:,.0f}"


def count(number: int, what: str) -> str:
    """1 row, 2 rows."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def recipe_lines(values: Mapping[str, Any]) -> list[str]:
    """Values by dotted names, those of a section together, as the lines of a recipe."""
    lines: list[str] = []
    for name, value in values.items():
        section, _, field = name.partition(".")
        lines += [] if f"{section}:" in lines else [f"{section}:"]
        lines.append(f"  {field}: {json.dumps(value, ensure_ascii=False)}")
    return lines


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


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


def share_held(share: float | None) -> str:
    """What of the weights is quantized, to stand behind how they are held; empty where it is not known."""
    return "" if share is None else f"{percent(share)} of the weights outside embeddings and head are held so"


def plain(text: object) -> str:
    """The text without what HTML and XML cannot hold."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(text).replace("\r\n", "\n"))


def shorten(text: str, most: int) -> str:
    """One line of at most `most` characters: what is left out is in the middle."""
    text = " ".join(plain(text).split())
    return text if len(text) <= most else f"{text[: most - most // 2 - 1]}…{text[-(most // 2) :]}"


def sparkline(values: list[float], width: int) -> str:
    """The values as bars, averaged into at most `width` of them."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    count = min(width, len(finite))
    edges = [round(i * len(finite) / count) for i in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BARS[round((v - low) / span * (len(BARS) - 1))] for v in means)
