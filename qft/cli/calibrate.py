"""`qft calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qft.cli.shell import AsJson, Debug, Overrides, Quiet, RecipePath, choose_lines, messages, require_one_of, tell
from qft.machine.environment import prepare_libraries

__all__ = ["calibrate"]


def calibrate(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Where to write instead of output_dir.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue behind the last finished block.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in output_dir.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize a trained model for inference, and accept the result or refuse it by what it lost."""
    with messages(debug):
        from qft.recipe import load

        loaded = load(recipe, [*(overrides or []), *([f"output_dir={out}"] if out else [])])
        require_one_of(resume=resume, overwrite=overwrite)
        prepare_libraries()
        from qft.commands.calibrate import calibrate as run_calibration
        from qft.views.terminal.calibration import render_calibration

        view = choose_lines(as_json, quiet)
        report = run_calibration(loaded, view, resume=resume, overwrite=overwrite)
        tell(report, render_calibration, as_json=as_json, quiet=quiet)
