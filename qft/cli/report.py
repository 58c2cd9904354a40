"""`qft report`."""

from pathlib import Path
from typing import Annotated

import typer

from qft.cli.shell import AsJson, Debug, messages, tell


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
        from rich.measure import Measurement

        from qft.documents.training import read_report
        from qft.views.marks import write_picture
        from qft.views.terminal.training import render

        document = read_report(run)
        if svg and not as_json:
            console = Console(record=True, width=100, file=StringIO(), force_terminal=True)
            view = render(document)
            least = Measurement.get(console, console.options.update(max_width=10_000), view).minimum
            console.width = max(100, least)
            console.print(view)
            write_picture(svg, console.export_svg(title=f"qft report {run.name}"))
        else:
            tell(document, render, as_json=as_json)
