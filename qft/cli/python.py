"""The commands for Python and notebooks: what they return is shown there as a terminal shows it.

They raise what the commands report: every error of qft.errors, with the same text.
"""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from qft.machine.environment import prepare_libraries

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from qft.documents.plan import CalibrationCheck, PlanDocument
    from qft.documents.training import Report

Document = TypeVar("Document")
WIDTH = 100
"""Columns of what is shown."""


@dataclass(frozen=True, repr=False)
class Shown(Generic[Document]):
    """A document, and how it is shown."""

    document: Document
    """As it is written into the run folder: `shown.document.train.loss`, or `.model_dump()` for plain values."""
    render: Callable[[Document], "RenderableType"]

    def __repr__(self) -> str:
        return self._drawn().export_text()

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        code = '<pre style="line-height:normal;font-family:monospace">{code}</pre>'
        return self._drawn().export_html(inline_styles=True, code_format=code)

    def _drawn(self) -> "Console":
        from qft.views.live import console

        drawn = console(file=io.StringIO(), record=True, width=WIDTH, force_jupyter=False)
        drawn.print(self.render(self.document), crop=False)
        return drawn


def check(recipe: str | Path, changes: Mapping[str, Any] | None = None) -> "Shown[PlanDocument | CalibrationCheck]":
    """What a recipe would do, and whether it can: `qft check`. `changes`: fields, as in {"train.max_steps": 20}."""
    from qft.recipe import load

    loaded = load(Path(recipe), _overrides(changes))
    prepare_libraries()
    from qft.commands.check import planned
    from qft.views.terminal.plan import render_plan

    return Shown(planned(loaded), render_plan)


def train(
    recipe: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> "Shown[Report]":
    """Finetune as a recipe says: `qft train`. With `quiet` no progress is shown."""
    if resume and overwrite:
        raise ValueError("resume continues a run and overwrite replaces it: give one of the two")
    from qft.recipe import load

    loaded = load(Path(recipe), _overrides(changes))
    prepare_libraries()
    from qft.commands.train import train as run_training
    from qft.views.live import choose_view, console
    from qft.views.terminal.training import render

    with choose_view(console(), quiet=quiet) as view:
        return Shown(run_training(loaded, view, resume=resume, overwrite=overwrite), render)


def _overrides(changes: Mapping[str, Any] | None) -> list[str]:
    """As --set takes them; numbers of numpy and torch are numbers."""
    return [f"{field}={json.dumps(value, default=_plain)}" for field, value in (changes or {}).items()]


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)
