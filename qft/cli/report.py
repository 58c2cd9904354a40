"""`qft report`."""

from pathlib import Path
from typing import Annotated

import typer

from qft.cli.shell import AsJson, Debug, messages, tell
from qft.errors import DamagedError, MissingError, RecipeError

VERIFY = "Hash its files and those of its exports; exit code 4 if one is not as it was written, 3 if that is not known."
ACCEPT = "With --verify: record its files as they are now, since it is meant."


def report(
    run: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    svg: Annotated[Path | None, typer.Option(help="Write the tables as an SVG picture.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help=VERIFY)] = False,
    accept: Annotated[bool, typer.Option("--accept", help=ACCEPT)] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the report of a finished run again, or verify its files."""
    with messages(debug):
        if accept and not verify:
            raise RecipeError("--accept: says that changes are meant that --verify finds; give both")
        if verify and svg:
            raise RecipeError("--svg: draws a report, and --verify shows none; leave one out")
        if verify:
            _verify(run, accept=accept, as_json=as_json)
        else:
            _show(run, svg, as_json=as_json)


def _verify(run: Path, *, accept: bool, as_json: bool) -> None:
    from qft.commands import verify
    from qft.views.terminal.verification import render_verification

    document = verify.accept(run) if accept else verify.verify(run)
    tell(document, render_verification, as_json=as_json)
    if document.problems:
        kind = DamagedError if document.whole is False else MissingError
        raise kind("\n".join(document.problems))


def _show(run: Path, svg: Path | None, *, as_json: bool) -> None:
    from io import StringIO

    from rich.measure import Measurement

    from qft.documents.recorded import record_of_run
    from qft.documents.training import read_report
    from qft.views.live import console
    from qft.views.marks import write_picture
    from qft.views.terminal.training import render
    from qft.views.words import plain

    document = read_report(run)
    if record := record_of_run(run):
        record.part("report.json").require_whole()
    if svg and not as_json:
        paper = console(record=True, width=100, file=StringIO(), force_terminal=True)
        view = render(document)
        least = Measurement.get(paper, paper.options.update(max_width=10_000), view).minimum
        paper.width = max(100, least)
        paper.print(view)
        write_picture(svg, paper.export_svg(title=plain(f"qft report {run.name}")))
    else:
        tell(document, render, as_json=as_json)
