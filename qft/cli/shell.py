"""What all commands share: how they speak, and how they fail."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qft.errors import Elsewhere, Interrupted, MissingError, is_failure
from qft.views.words import CONTROLS

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from qft.progress import View

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
SET_HELP = "Override a field; paths are relative to here. Repeatable."


def _completed(incomplete: str) -> list[str]:
    from qft.arrive.explain import completed

    return list(completed(incomplete))


Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help=SET_HELP, autocompletion=_completed),
]
TARGET_HELP = (
    "A recipe, a run, or a model; PATH@VARIANT for base, float32, bfloat16, float16, nf4, fp4, 8bit, merged, (a .gguf "
    "file) llama.cpp, or vllm: an export or a model by vLLM's server."
)
NAMES = {"evaluate": "eval", "list_models": "list"}
"""Of commands whose functions are called otherwise, so as not to hide what Python has under that name."""
CLOSED_PIPE = 141
"""What a shell sees of a program that SIGPIPE ends."""


@contextmanager
def messages(
    debug: bool, interrupted: str = "interrupted; continue with --resume once a checkpoint is written"
) -> Iterator[None]:
    """The one door for failures: each becomes one message and its exit code, and Ctrl-C becomes `interrupted`. A pipe
    that its reader has closed is no failure."""
    _take_any_character()
    try:
        _require_place()
        yield
        sys.stdout.flush()
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Interrupted as error:
        say(str(error))
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        say(interrupted)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        _leave_pipe()
        raise typer.Exit(CLOSED_PIPE) from None
    except Elsewhere as error:
        raise typer.Exit(error.exit_code) from None
    except BaseException as error:
        if not is_failure(error):
            raise
        if debug:
            import traceback

            say(traceback.format_exc())
        raise typer.Exit(_tell_failure(error)) from None


def _tell_failure(error: BaseException) -> int:
    """Say it, and return its exit code."""
    from qft.cli.failures import explained, unforeseen

    known = explained(error) or unforeseen(error)
    text = str(known) or type(known).__name__
    say(f"error: {text}" if "\n" not in text else text)
    return known.exit_code


def say(text: str) -> None:
    """A line on standard error, in which nothing commands the terminal."""
    with suppress(OSError):  # nobody reads it, and the exit code says it, too
        typer.echo(text.translate(CONTROLS), err=True)


def _require_place() -> None:
    """Raise MissingError where nothing relative can be found, nor asked for by libraries."""
    try:
        os.getcwd()
    except FileNotFoundError:
        text = "the folder in which this command was started is not there any more; `cd` to one that is"
        raise MissingError(text) from None


def _take_any_character() -> None:
    """Write characters that the terminal's encoding has not as escapes, rather than fail."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the shell has closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _leave_pipe() -> None:
    """Let nothing more be written to a closed pipe, as Python would when it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def register(app: typer.Typer, *commands: Callable[..., None]) -> None:
    """Add commands in this order, each with all of its docstring in the list of them."""
    for command in commands:
        app.command(NAMES.get(command.__name__, command.__name__), short_help=command.__doc__)(command)


def consoles(as_json: bool) -> Console:
    """Where people read: standard output, or standard error when that carries JSON."""
    from qft.views.live import console

    return console(stderr=as_json)


def tell(document: Any, render: Callable[[Any], RenderableType], *, as_json: bool, quiet: bool = False) -> None:
    """Print a document, or several: as JSON, as `render` draws them, or with `quiet` not at all."""
    if as_json:
        print_json(document)
    elif not quiet:
        from rich.console import Group

        consoles(False).print(Group(render(document)), crop=False)  # lines that people copy may be longer


def print_json(document: object) -> None:
    import json

    write = partial(json.dumps, document, indent=2, default=_plain)
    text = write(ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = write()
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)


def choose_lines(as_json: bool, quiet: bool) -> View:
    """A plain line for each note, or nothing."""
    from qft.progress import BARS, View
    from qft.views.live import LineView

    BARS.set(not quiet)
    return View() if quiet else LineView(consoles(as_json))
