"""What became of another tool's configuration, what a field means, and what a machine can do, as rich tables."""

from rich.console import Group

from qft.arrive.engine import Translation
from qft.arrive.explain import Explained
from qft.arrive.line import Kind
from qft.arrive.written import ORDER, brief, shown
from qft.views.terminal.table import Facts, spaced

VALUE = 24
"""Characters of a value: beside a longer one a narrow terminal has no room for what became of it."""


def render_translation(made: Translation) -> Group:
    """What `qft init --from` shows: every key, what is not supported last, where it is seen."""
    parts = []
    for kind in reversed(ORDER):
        table = Facts(f"{made.tool}: {kind}")
        for line in made.lines:
            if line.kind is kind:
                value = "" if line.value is None or kind is Kind.DEFAULT else f" {brief(line.value, VALUE)}"
                table.add(f"{line.key}{value}", shown(line) or "as it is")
        if table.rows:
            parts.append(table)
    return spaced(*parts)


def render_field(found: Explained) -> Group:
    """What `qft explain` shows."""
    table = Facts(found.field)
    table.add("meaning", found.meaning or "see its fields")
    table.add("takes", found.takes)
    if found.default:
        table.add("default", found.default)
    table.add("read by", found.reader)
    for tool, keys in found.peers.items():
        table.add(f"in {tool}", ", ".join(keys))
    if found.inner:
        table.add("fields", ", ".join(name.rpartition(".")[2] for name in found.inner))
    return spaced(table)
