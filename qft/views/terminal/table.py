"""A table as all views draw it."""

from __future__ import annotations

from rich import box
from rich.table import Table

__all__ = ["table"]


def table(title: str, *columns: str) -> Table:
    """A titled table: of names and what they are, or with a head of its own."""
    made = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD if columns else None,
        show_header=bool(columns),
        show_edge=False,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    made.add_column(columns[0] if columns else "", style="cyan", min_width=0 if columns else 22, overflow="fold")
    for name in columns[1:] or ("",):
        made.add_column(name, justify="right" if columns else "left", overflow="fold")
    return made
