"""`qft check`."""

from __future__ import annotations

from qft.cli.shell import AsJson, Debug, Overrides, RecipePath, messages, tell
from qft.machine.environment import prepare_libraries

__all__ = ["check"]


def check(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Say what a recipe would do, and whether it can, before anything is loaded."""
    with messages(debug):
        from qft.recipe import load

        loaded = load(recipe, overrides or [])
        prepare_libraries()
        from qft.commands.check import planned
        from qft.views.terminal.plan import render_plan

        tell(planned(loaded), render_plan, as_json=as_json)
