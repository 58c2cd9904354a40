"""`qft init` and `qft schema`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qft.cli.shell import Debug, messages, print_json

__all__ = ["init", "schema"]


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
        typer.echo(f"{path} written; next: qft check {path}")


def schema(
    of: Annotated[
        str,
        typer.Argument(
            metavar="[DOCUMENT]",
            help="recipe, report, eval, calibration, export, plan, calibration-plan, calibration-record, manifest, "
            "registry or history.",
        ),
    ] = "recipe",
) -> None:
    """Print the JSON Schema of a recipe (for editors) or of a document, such as report.json."""
    from qft.documents import DOCUMENTS

    if of == "recipe":
        from qft.recipe import json_schema

        print_json(json_schema())
    elif of in DOCUMENTS:
        dialect = "https://json-schema.org/draft/2020-12/schema"
        print_json({"$schema": dialect, **DOCUMENTS[of].model_json_schema()})
    else:
        raise typer.BadParameter(f"{of} is none of recipe, {', '.join(DOCUMENTS)}")
