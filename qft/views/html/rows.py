"""The page of the rows of a plan."""

from __future__ import annotations

from collections.abc import Sequence

from qft.documents.plan import DataPart
from qft.documents.rows import ShownRow
from qft.views.html import rows_pictures
from qft.views.html.page import ENVIRONMENT


def rows_page(data: DataPart, shown: Sequence[ShownRow], recipe: str) -> str:
    """The rows of a plan, as they are learnt: lengths, sources, findings, and those `shown`, token by token."""
    parts = rows_pictures.parts(data)
    rows = [rows_pictures.drawn(row) for row in shown]
    return ENVIRONMENT.get_template("rows.html.jinja").render(recipe=recipe, data=data, rows=rows, **parts)
