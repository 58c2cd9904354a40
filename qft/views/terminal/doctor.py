"""What a machine can do, as rich tables."""

from collections.abc import Sequence

from rich.console import Group

from qft.machine.doctor import Finding
from qft.views.terminal.table import Facts, spaced

TITLES = {"machine": "This machine", "packages": "What qft needs", "optional": "What more can be had"}
MARKS = {"ok": "✓", "missing": "○", "broken": "✗", "info": "·"}


def render_doctor(found: Sequence[Finding]) -> Group:
    """What `qft doctor` shows."""
    tables = []
    for part, title in TITLES.items():
        table = Facts(title)
        for each in found:
            if each.part == part:
                table.add(f"{MARKS[each.state]} {each.name}", each.text)
        tables.append(table)
    return spaced(*tables)
