"""What a training will take of memory, as rich tables."""

from rich.console import Group, RenderableType

from qft.documents.plan import PlannedMemory
from qft.views.terminal.table import Facts, Rows, spaced
from qft.views.words import size

AGAIN = {
    "inputs": "all",
    "attention": "gate, up and outputs of norms",
    "products": "outputs of norms",
    "all": "nothing",
}
"""By what a block keeps."""
SHOWN = 8
"""Ways that are shown of those that were looked at."""


def render_memory(memory: PlannedMemory, which: str = "") -> Group:
    """The predicted peak, what it is made of, and what else was thought of."""
    rows = Facts(f"Memory, predicted{which}")
    if memory.optimizer:
        rows.add("optimizer", memory.optimizer)
    if memory.predicted_peak_bytes is None or memory.predicted_host_bytes is None:
        rows.add("unknown", f"{memory.unknown}")
        return Group(rows)
    said = "fits" if memory.fits else "does NOT fit"
    budget = f"{said} into {size(memory.budget_bytes)} of {size(memory.device_bytes)}"
    rows.add("peak", f"{size(memory.predicted_peak_bytes)}: {budget}")
    worst = sorted(memory.components.items(), key=lambda item: -item[1])
    rows.add("of it", ", ".join(f"{name.replace('_', ' ')} {size(count)}" for name, count in worst))
    rows.add("host", size(memory.predicted_host_bytes))
    if memory.recomputed_blocks is not None:
        rows.add("computed again", _again(memory))
    parts: list[RenderableType] = [rows]
    if len(memory.ways) > 1:
        parts.append(_ways(memory))
    return spaced(*parts) if len(parts) > 1 else Group(*parts)


def _again(memory: PlannedMemory) -> str:
    if not memory.ways:
        return f"{memory.recomputed_blocks} blocks"
    way = memory.ways[0]
    first = f"{AGAIN[way.least]} of {way.recomputed} blocks" if way.recomputed else ""
    others = f"{AGAIN[way.most]} of the others" if way.most != "all" else ""
    return ", ".join(filter(None, (first, others))) or "nothing"


def _ways(memory: PlannedMemory) -> Rows:
    best = memory.ways[0].speed
    table = Rows("Ways to make the same step, the chosen one first", "rows", "accumulated", "again", "memory", "speed")
    for way in memory.ways[:SHOWN]:
        speed = f"{way.speed / best:.0%}" if way.fits else "does not fit"
        table.add(str(way.rows), str(way.accumulated), f"{way.recomputed} blocks", size(way.peak), speed)
    return table
