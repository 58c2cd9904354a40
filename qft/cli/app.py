"""`qft`: the commands, put together."""

import logging
import sys
import warnings
from typing import Annotated

import typer

from qft.cli.export import export
from qft.cli.guide import doctor, explain
from qft.cli.models import models
from qft.cli.recipes import calibrate, check, init, schema, train
from qft.cli.report import report
from qft.cli.serve import serve
from qft.cli.shell import register
from qft.cli.targets import chat, evaluate
from qft.machine.streams import open_closed, outlive_readers

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes cut the names of options, and wrap what an error says to run
    help="Finetune language models whose weights are held in few bits.",
)


def main() -> None:
    """Entry point of `qft`: what libraries warn of is shown to those who ask for it (`-W`, PYTHONWARNINGS, --debug)."""
    open_closed()
    outlive_readers()
    if not sys.warnoptions and "--debug" not in sys.argv:
        warnings.simplefilter("ignore")
        logging.getLogger().addHandler(logging.NullHandler())  # else Python prints what no library handles
    app()


def show_version(wanted: bool) -> None:
    if not wanted:
        return
    from qft.machine.device import find_device, versions

    device = find_device("auto")
    for name, version in versions().items():
        typer.echo(f"{name:<14}{version or 'none'}")
    typer.echo(f"{'gpu':<14}{device.name if device and device.kind == 'cuda' else 'none'}")
    raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the versions that matter.")
    ] = False,
) -> None:
    pass


register(app, check, train, calibrate, evaluate, export, serve, chat, report, init, explain, doctor, schema)
app.add_typer(models, name="models", short_help=models.info.help)
