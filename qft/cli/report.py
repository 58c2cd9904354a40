"""`qft report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qft.cli.shell import AsJson, Debug, consoles, messages, print_json

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    svg: Annotated[Path | None, typer.Option(help="Write the tables as an SVG picture.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the report of a finished run again."""
    with messages(debug):
        from io import StringIO

        from rich.console import Console

        from qft.documents.training import read_report
        from qft.files import write_text
        from qft.views.terminal.training import render

        document = read_report(run)
        if as_json:
            print_json(document.model_dump(mode="json"))
        elif svg:
            console = Console(record=True, width=100, file=StringIO(), force_terminal=True)
            console.print(render(document))
            write_text(svg, console.export_svg(title=f"qft report {run.name}"))
        else:
            consoles(False).print(render(document))
