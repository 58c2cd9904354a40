"""`qft chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qft.cli.shell import TARGET_HELP, AsJson, Debug, messages, print_json
from qft.machine.environment import prepare_libraries

__all__ = ["chat"]


def chat(
    target: Annotated[str, typer.Argument(metavar="TARGET", help=TARGET_HELP, show_default=False)],
    adapter: Annotated[Path | None, typer.Option(help="Put this adapter on a model that brings none.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this alone, instead of a conversation.")] = None,
    system: Annotated[str | None, typer.Option(help="What the system says before the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
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
        prepare_libraries()
        from qft.commands.chat import open_session
        from qft.commands.conversation import ChatOptions

        options = ChatOptions(system, max_new_tokens, temperature, top_p, seed)
        session = open_session(target, adapter, options, prompt, lambda text: typer.echo(text, err=True))
        if prompt is None:
            session.run()
        elif as_json:
            print_json(session.answer_json(prompt))
        else:
            session.say(prompt)
