"""What all commands share: how they speak, and how they fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qft.errors import Interrupted, QftError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from qft.progress import View

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
SET_HELP = "Override a field; paths are relative to here. Repeatable."
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help=SET_HELP)]
TARGET_HELP = (
    "A recipe, a run, or a model; PATH@VARIANT for base, float32, bfloat16, float16, nf4, fp4, 8bit, merged or (a "
    ".gguf file) llama.cpp."
)
NAMES = {"evaluate": "eval", "list_models": "list"}
"""Of commands whose functions are called otherwise, so as not to hide what Python has under that name."""


@contextmanager
def messages(
    debug: bool, interrupted: str = "interrupted; continue with --resume once a checkpoint is written"
) -> Iterator[None]:
    """Turn a QftError into its one message and exit code, and Ctrl-C into `interrupted`."""
    try:
        yield
    except QftError as error:
        if debug:
            raise
        typer.echo(f"error: {error}" if "\n" not in str(error) else str(error), err=True)
        raise typer.Exit(error.exit_code) from None
    except Interrupted as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo(interrupted, err=True)
        raise typer.Exit(130) from None


def register(app: typer.Typer, *commands: Callable[..., None]) -> None:
    """Add commands in this order, each with all of its docstring in the list of them."""
    for command in commands:
        app.command(NAMES.get(command.__name__, command.__name__), short_help=command.__doc__)(command)


def consoles(as_json: bool) -> Console:
    """Where people read: standard output, or standard error when that carries JSON."""
    from rich.console import Console

    return Console(stderr=as_json)


def tell(document: Any, render: Callable[[Any], RenderableType], *, as_json: bool, quiet: bool = False) -> None:
    """Print a document, or several: as JSON, as `render` draws them, or with `quiet` not at all."""
    if as_json:
        print_json(document)
    elif not quiet:
        from rich.console import Group

        consoles(False).print(Group(render(document)), crop=False)  # lines that people copy may be longer


def print_json(document: object) -> None:
    import json

    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)


def choose_lines(as_json: bool, quiet: bool) -> View:
    """A plain line for each note, or nothing."""
    from qft.progress import View
    from qft.views.live import LineView

    return View() if quiet else LineView(consoles(as_json))
