"""`qft serve`: the command line of the server that serves a model."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from qft.cli.shell import Debug, messages, say

Engine = Literal["vllm", "llama.cpp", "ollama"]
WHAT = "A run, the folder of an export or a model, a .gguf file, or a model's name in the registry."
ENGINE = "By default vllm, and llama.cpp for GGUF files; ollama prints a Modelfile."
CONTEXT = "Tokens of the longest request with its answer; by default what the model was built for."
MORE = "Options of the server's own, added at the end."
RUN = "Start it, in this process's place."
PYTHON = "The Python of the environment that has the engine, for --run."


def serve(
    target: Annotated[str, typer.Argument(metavar="TARGET", help=WHAT, show_default=False)],
    more: Annotated[list[str] | None, typer.Argument(metavar="[-- OPTION...]", help=MORE)] = None,
    to: Annotated[str | None, typer.Option(metavar="TARGET", help="Which export of a run.")] = None,
    engine: Annotated[Engine | None, typer.Option(help=ENGINE)] = None,
    registry: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the registry.")] = Path("models"),
    version: Annotated[str, typer.Option(help="Of a model of the registry: a number, or current.")] = "current",
    name: Annotated[str | None, typer.Option(help="By which requests name it; by default its own.")] = None,
    host: Annotated[str | None, typer.Option(help="Address that it listens on; by default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="And its port; by default 8000.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help=CONTEXT)] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Of the model's own code.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Although no gate has passed it.")] = False,
    run: Annotated[bool, typer.Option("--run", help=RUN)] = False,
    engine_python: Annotated[Path | None, typer.Option(metavar="PYTHON", help=PYTHON)] = None,
    debug: Debug = False,
) -> None:
    """Print the command line that serves a model by vLLM, llama.cpp or Ollama; with --run, start it."""
    with messages(debug, interrupted="interrupted"):
        from qft.commands.serve import ServeOptions, find_start, shown
        from qft.commands.serve import run as run_server
        from qft.serving.command import Where

        if engine_python and not run:
            raise typer.BadParameter("--engine-python says what --run starts; give --run too")
        where = Where(host, port, context, tuple(more or ()))
        options = ServeOptions(
            to=to,
            engine=engine,
            registry=registry,
            version=version,
            name=name,
            where=where,
            engine_python=engine_python,
            trust_remote_code=trust_remote_code,
            force=force,
        )
        found = find_start(target, options, lambda text: say(f"note: {text}"))
        if run:
            run_server(found, options)
        typer.echo(shown(found))
