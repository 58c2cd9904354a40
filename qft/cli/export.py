"""`qft export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from qft.cli.shell import AsJson, Debug, Overrides, Quiet, choose_lines, messages, tell
from qft.machine.environment import prepare_libraries

MergeInto = Literal["dequantized", "original"]
TO = "adapter, merged, bnb-4bit, bnb-8bit, compressed-tensors, gguf or gguf-KIND; by default the recipe's. Repeatable."
ENV = "Export nothing; tell whether `here`, or an environment such as vllm=0.11.0,cuda=8.0, can load it."
REGISTER = "Add what is written to the registry, as this model's next version."
REGISTRY = "Folder of the registry; by default the recipe's, or models."
ENGINE = "A Python that has vllm, in an environment of its own: the gate asks vLLM too."
PUSH = "Upload what passed to this repository of the hub."


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished training.", show_default=False)],
    to: Annotated[list[str] | None, typer.Option(metavar="TARGET", help=TO)] = None,
    out: Annotated[Path | None, typer.Option(help="Where the artifacts' folders go; by default RUN/export.")] = None,
    merge_into: Annotated[MergeInto | None, typer.Option(help="Base weights to add the adapter to.")] = None,
    gate: Annotated[bool, typer.Option("--gate/--no-gate", help="Prove what was written, or do not.")] = True,
    engine_python: Annotated[Path | None, typer.Option(metavar="PYTHON", help=ENGINE)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace artifacts of an earlier export.")] = False,
    environment: Annotated[str | None, typer.Option("--check-target", metavar="ENV", help=ENV)] = None,
    register: Annotated[str | None, typer.Option(metavar="NAME", help=REGISTER)] = None,
    registry: Annotated[Path | None, typer.Option(metavar="FOLDER", help=REGISTRY)] = None,
    push_to_hub: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help=PUSH)] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository of the hub private.")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Hand over a trained model in other forms, each proven to be the one that was trained."""
    with messages(debug):
        prepare_libraries()
        from qft.export import ExportOptions, check_target, refuse_unloadable
        from qft.export import export as run_export
        from qft.views.terminal.export import render_exports, render_loads

        options = ExportOptions(
            to=tuple(to or ()),
            out=out,
            merge_into=merge_into,
            gate=gate,
            engine_python=engine_python,
            overwrite=overwrite,
            overrides=tuple(overrides or ()),
            register=register,
            registry=registry,
            push_to_hub=push_to_hub,
            private=private,
        )
        view = choose_lines(as_json, quiet)
        if environment is None:
            tell(run_export(run, options, view), render_exports, as_json=as_json, quiet=quiet)
            return
        if register or push_to_hub or engine_python:
            unread = "--register, --push-to-hub and --engine-python"
            raise typer.BadParameter(f"--check-target writes nothing and asks nothing: leave out {unread}")
        checks = check_target(run, options, environment, view)
        tell(checks, render_loads, as_json=as_json, quiet=quiet)
        refuse_unloadable(checks)
