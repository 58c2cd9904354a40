"""`qft init` and `qft schema`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from qft.cli.shell import Debug, messages, print_json

__all__ = ["init", "schema"]

DOCUMENTS = {
    "report": ("qft.documents.training", "Report"),
    "eval": ("qft.documents.evaluation", "EvalDocument"),
    "calibration": ("qft.documents.calibration", "CalibrationReport"),
    "export": ("qft.documents.export", "ExportDocument"),
}
"""What commands write, by its name for `qft schema`: module and class."""


def init(
    path: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe to write.", show_default=False)],
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file or package:NAME/FILE.")],
    data: Annotated[Path, typer.Option(help="The training rows.")],
    debug: Debug = False,
) -> None:
    """Write a commented starter recipe."""
    with messages(debug):
        from qft.recipe.starter import write_starter

        write_starter(path, model, data)
        typer.echo(f"{path} written; next: qft check {quote(str(path))}")


def schema(
    of: Annotated[
        str, typer.Argument(metavar="[recipe|report|eval|calibration|export]", help="Which document.")
    ] = "recipe",
) -> None:
    """Print the JSON Schema of a recipe (for editors) or of a document, such as report.json."""
    if of == "recipe":
        from qft.recipe import json_schema

        print_json(json_schema())
    elif of in DOCUMENTS:
        from importlib import import_module

        module, name = DOCUMENTS[of]
        own = getattr(import_module(module), name).model_json_schema()
        print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **own})
    else:
        raise typer.BadParameter(f"{of} is none of recipe, {', '.join(DOCUMENTS)}")
