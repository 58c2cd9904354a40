"""What is done with models: `qft eval` and `qft chat`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qft.cli.shell import TARGET_HELP, AsJson, Debug, Quiet, choose_lines, messages, print_json, say, tell
from qft.machine.environment import prepare_libraries

if TYPE_CHECKING:
    from qft.serving.options import EngineOptions

URL = "Ask the OpenAI-compatible server at this address (vLLM, SGLang, llama.cpp, Ollama), and load nothing."
MODEL = "The model that the server at --url is asked for, where it has several."
TIMEOUT = "Seconds that the server at --url may say nothing."
PYTHON = "Of TARGET@vllm: the Python of the environment that has vLLM; by default the recipe's export.engine_python."
CONTEXT = "Of TARGET@vllm: tokens of the longest request with its answer; by default what the model was built for."
CONCURRENCY = "Requests at once at which an engine's speed is measured: 1, 8 and 32. Repeatable; 0: not at all."
HARNESS = "A task of lm-evaluation-harness, by name or file. Repeatable."
Targets = Annotated[list[str] | None, typer.Argument(metavar="TARGET...", help=TARGET_HELP, show_default=False)]


def evaluate(
    targets: Targets = None,
    url: Annotated[str | None, typer.Option("--url", metavar="URL", help=URL)] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help=MODEL)] = None,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", min=0.001, help=TIMEOUT)] = None,
    concurrency: Annotated[list[int] | None, typer.Option(metavar="N", min=0, max=4096, help=CONCURRENCY)] = None,
    engine_python: Annotated[Path | None, typer.Option(metavar="PYTHON", help=PYTHON)] = None,
    context: Annotated[int | None, typer.Option(min=1, help=CONTEXT)] = None,
    adapter: Annotated[Path | None, typer.Option(help="Put this adapter on models that bring none.")] = None,
    data: Annotated[str | None, typer.Option(help="Other rows, or a plain text.")] = None,
    reference: Annotated[str | None, typer.Option(help="The target that the others are compared with.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="A task score beside the recipe's. Repeatable.")] = None,
    harness: Annotated[list[str] | None, typer.Option(metavar="TASK", help=HARNESS)] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window over plain text.")] = 512,
    stride: Annotated[int, typer.Option(min=1, help="Tokens from one window to the next.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are read at once, or asked of --url.")] = 8,
    kl_tokens: Annotated[int, typer.Option(min=1, help="Tokens over which distributions are compared.")] = 8192,
    layers: Annotated[bool, typer.Option("--layers", help="Tell each layer's error against the reference.")] = False,
    advise: Annotated[bool, typer.Option("--advise", help="Tell what to try next with one run, and why.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where to write; by default into a run's folder.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare models on the same rows and tokens: quality, memory and speed."""
    with messages(debug, interrupted="interrupted"):
        engine = _engine(url, model, timeout, concurrency, engine_python, context, targets or ())
        prepare_libraries()
        from qft.commands.evaluate import EvalOptions
        from qft.commands.evaluate import evaluate as run_evaluation
        from qft.commands.results import default_out
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
            advise=advise,
            out=out or default_out(targets or ()),
            engine=engine,
        )
        view = choose_lines(as_json, quiet)
        tell(run_evaluation(targets or (), options, view), render_comparison, as_json=as_json, quiet=quiet)


def _engine(
    url: str | None,
    model: str | None,
    timeout: float | None,
    concurrency: list[int] | None,
    python: Path | None,
    context: int | None,
    targets: Sequence[str],
) -> EngineOptions:
    from qft.serving.options import EngineOptions

    in_vllm = any(_is_in_vllm(target) for target in targets)
    if url is not None and in_vllm:
        raise typer.BadParameter("--url: names a server, and TARGET@vllm starts one; leave out one of them")
    for name, given in {"--timeout": timeout, "--concurrency": concurrency}.items():
        if given is not None and url is None and not in_vllm:
            raise typer.BadParameter(f"{name}: is of a server; give --url, or name TARGET@vllm")
    if model is not None and url is None:
        raise typer.BadParameter("--model: is of a server; give --url")
    for name, value in {"--engine-python": python, "--context": context}.items():
        if value is not None and not in_vllm:
            raise typer.BadParameter(f"{name}: is of the server that TARGET@vllm starts; name TARGET so")
    if not targets and url is None:
        raise typer.BadParameter("say which model: a TARGET, or a server by --url")
    levels = None if concurrency is None else tuple(filter(None, concurrency))
    return EngineOptions(url, model, timeout, python, context, levels)


def _is_in_vllm(target: str) -> bool:
    return target.endswith("@vllm")


def chat(
    target: Annotated[str | None, typer.Argument(metavar="TARGET", help=TARGET_HELP, show_default=False)] = None,
    url: Annotated[str | None, typer.Option("--url", metavar="URL", help=URL)] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help=MODEL)] = None,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", min=0.001, help=TIMEOUT)] = None,
    engine_python: Annotated[Path | None, typer.Option(metavar="PYTHON", help=PYTHON)] = None,
    context: Annotated[int | None, typer.Option(min=1, help=CONTEXT)] = None,
    adapter: Annotated[Path | None, typer.Option(help="Put this adapter on a model that brings none.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this alone, instead of a conversation.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Ask the first question with it. Repeatable.")] = None,
    system: Annotated[str | None, typer.Option(help="What the system says before the conversation.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; without: up to 512.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token; above, one is drawn.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Draw from the most likely tokens of this share.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of what is drawn.")] = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Talk to a model: in the terminal, from a pipe (each line is a turn), or one answer to --prompt."""
    with messages(debug, interrupted="interrupted"):
        if as_json and prompt is None:
            raise typer.BadParameter("--json prints one answer; give --prompt TEXT")
        engine = _engine(url, model, timeout, None, engine_python, context, (target,) if target else ())
        in_vllm = target is not None and _is_in_vllm(target)
        where = "--url" if url is not None else "@vllm" if in_vllm else None
        _require_text(where, {"TARGET": url is not None and target, "--adapter": adapter, "--image": image})
        prepare_libraries()
        from qft.commands.by_vllm import open_vllm
        from qft.commands.chat import open_session
        from qft.commands.conversation import ChatOptions
        from qft.commands.remote import open_remote

        options = ChatOptions(system, max_new_tokens, temperature, top_p, seed)
        with ExitStack() as server:
            if url is not None:
                session = open_remote(engine, options, prompt, say)
            elif in_vllm:
                session = server.enter_context(open_vllm(str(target), engine, options, prompt, say))
            else:
                session = open_session(target or "", adapter, options, prompt, say, image or ())
            if prompt is None:
                session.run()
            elif as_json:
                print_json(session.answer_json(prompt))
            else:
                session.say(prompt)


def _require_text(where: str | None, given: Mapping[str, object]) -> None:
    unread = next((name for name, value in given.items() if value), None)
    if where and unread:
        raise typer.BadParameter(f"{unread}: not with {where}, whose server has its model, and is asked in text")
