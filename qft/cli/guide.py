"""What leads people: `qft explain` and `qft doctor`."""

from collections.abc import Iterator
from typing import Annotated

import typer

from qft.cli.shell import AsJson, Debug, messages, tell


def completed_field(incomplete: str) -> Iterator[str]:
    """Names of fields, and of sections."""
    from qft.arrive.explain import field_names

    yield from (name for name in field_names() if name.startswith(incomplete))


def explain(
    field: Annotated[
        str,
        typer.Argument(metavar="FIELD", help="As in train.warmup_steps.", autocompletion=completed_field),
    ],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what a field of the recipe means, what it takes, who reads it, and what other tools call it."""
    with messages(debug):
        import dataclasses

        from qft.arrive.explain import explain as explained
        from qft.views.terminal.arrive import render_field

        found = explained(field)
        tell(dataclasses.asdict(found) if as_json else found, render_field, as_json=as_json)


def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Say what this machine can do, what is missing for what, and which versions do not go together; exit code 1 if
    some do not."""
    with messages(debug):
        import dataclasses
        from pathlib import Path

        from qft.machine.doctor import diagnose
        from qft.views.terminal.doctor import render_doctor

        found = diagnose(Path.cwd())
        tell([dataclasses.asdict(each) for each in found] if as_json else found, render_doctor, as_json=as_json)
        if any(each.state == "broken" for each in found):
            raise typer.Exit(1)
