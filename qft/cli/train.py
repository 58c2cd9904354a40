"""`qft train`."""

from __future__ import annotations

from typing import Annotated

import typer

from qft.cli.shell import AsJson, Debug, Overrides, Quiet, RecipePath, consoles, messages, require_one_of, tell
from qft.machine.environment import prepare_libraries

__all__ = ["train"]


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in output_dir.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Finetune as the recipe says, and report memory and throughput."""
    with messages(debug):
        from qft.recipe import load

        loaded = load(recipe, overrides or [])
        require_one_of(resume=resume, overwrite=overwrite)
        prepare_libraries()
        from qft.commands.train import train as run_training
        from qft.views.live import choose_view
        from qft.views.terminal.training import render

        with choose_view(consoles(as_json), quiet=quiet) as view:
            report = run_training(loaded, view, resume=resume, overwrite=overwrite)
        tell(report, render, as_json=as_json, quiet=quiet)
