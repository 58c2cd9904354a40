"""`qft eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qft.cli.shell import TARGET_HELP, AsJson, Debug, Quiet, choose_lines, messages, tell
from qft.machine.environment import prepare_libraries

__all__ = ["evaluate"]


def evaluate(
    targets: Annotated[list[str], typer.Argument(metavar="TARGET...", help=TARGET_HELP, show_default=False)],
    adapter: Annotated[Path | None, typer.Option(help="Put this adapter on models that bring none.")] = None,
    data: Annotated[str | None, typer.Option(help="Other rows, or a plain text.")] = None,
    reference: Annotated[str | None, typer.Option(help="The target that the others are compared with.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="A task score beside the recipe's. Repeatable.")] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="A task of lm-evaluation-harness, by name or file. Repeatable."),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window over plain text.")] = 512,
    stride: Annotated[int, typer.Option(min=1, help="Tokens from one window to the next.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are read at once.")] = 8,
    kl_tokens: Annotated[int, typer.Option(min=1, help="Tokens over which distributions are compared.")] = 8192,
    layers: Annotated[bool, typer.Option("--layers", help="Tell each layer's error against the reference.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where to write; by default into a run's folder.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare models on the same rows and tokens: quality, memory and speed."""
    with messages(debug):
        prepare_libraries()
        from qft.commands.evaluate import EvalOptions, default_out
        from qft.commands.evaluate import evaluate as run_evaluation
        from qft.views.terminal.evaluation import render_comparison

        options = EvalOptions(
            adapter=adapter,
            data=data,
            window=window,
            stride=stride,
            reference=reference,
            metrics=tuple(metric or ()),
            harness=tuple(harness or ()),
            batch_size=batch_size,
            kl_tokens=kl_tokens,
            layers=layers,
            out=out or default_out(targets),
        )
        view = choose_lines(as_json, quiet)
        tell(run_evaluation(targets, options, view), render_comparison, as_json=as_json, quiet=quiet)
