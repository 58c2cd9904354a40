"""The training as it happens: a live view on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import math
import time
from collections import deque
from statistics import fmean
from typing import Any

from rich.console import (
    Console,
    ConsoleOptions,
    ConsoleRenderable,
    Group,
    RenderableType,
    RenderHook,
    RenderResult,
)
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from qft.progress import BARS, Step, View
from qft.views.words import CONTROLS, size, sparkline

RECENT = 20
"""Steps over which speed and the time left are taken."""


class _Clean:
    """What is drawn, without what could command a terminal."""

    def __init__(self, drawn: RenderableType) -> None:
        self.drawn = drawn

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self.drawn, options):
            yield Segment(text if control else text.translate(CONTROLS), style, control)


class _Cleaner(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Clean(each) for each in renderables]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # rich calls it where it has caught BrokenPipeError


def console(**options: Any) -> Console:
    """What qft draws on: texts come from data, and command nothing. Raises BrokenPipeError once nobody reads."""
    made = _Console(**options)
    made.push_render_hook(_Cleaner())
    return made


def choose_view(console: Console, *, quiet: bool) -> View:
    """The view that fits where the output goes."""
    BARS.set(not quiet)
    if quiet:
        return View()
    return LiveView(console) if console.is_terminal else LineView(console)


def _print(console: Console, text: str) -> None:
    """One line, however long, as it is: people copy from it."""
    console.print(text, soft_wrap=True, markup=False, emoji=False, highlight=False)


class LineView(View):
    """A plain line for each note, and for a step at most every `every` seconds."""

    def __init__(self, console: Console, every: float = 5.0) -> None:
        self.console, self.every = console, every
        self.steps = 0
        self.seconds: list[float] = []
        self._last = -math.inf

    def note(self, text: str) -> None:
        _print(self.console, text)

    def begin(self, steps: int, done: int) -> None:
        self.steps = steps

    def step(self, step: Step) -> None:
        self.seconds.append(step.seconds)
        now = time.monotonic()
        if now - self._last < self.every and step.step != self.steps:
            return
        self._last = now
        recent = self.seconds[1:][-RECENT:] or self.seconds  # the first step also allocates
        left = (self.steps - step.step) * fmean(recent)
        self.note(
            f"step {step.step}/{self.steps}  loss {step.loss:.4f}  lr {step.learning_rate:.2e}  "
            f"{step.tokens / step.seconds:,.0f} tokens/s  memory {size(step.memory)} (peak {size(step.peak_memory)})  "
            f"{left:.0f} s left" + ("  SKIPPED: not finite" if step.skipped else "")
        )


class LiveView(View):
    """A progress bar with the loss's curve, speed and memory under it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.losses: list[float] = []
        self.recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        done = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*done, TextColumn("left"), TimeRemainingColumn(), console=console)
        self.task = self.progress.add_task("training", total=None, visible=False)
        self.live = Live(self.progress, console=console, refresh_per_second=4)

    def __enter__(self) -> LiveView:
        self.live.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.live.stop()

    def note(self, text: str) -> None:
        _print(self.live.console, text)

    def begin(self, steps: int, done: int) -> None:
        self.progress.update(self.task, total=steps, completed=done, visible=True)

    def step(self, step: Step) -> None:
        self.losses.append(step.loss)
        self.recent.append((step.tokens, step.seconds))
        if step.skipped:
            self.note(f"step {step.step}: skipped, a number was not finite")
        self.progress.update(self.task, completed=step.step)
        tokens, seconds = (sum(column) for column in zip(*self.recent, strict=True))
        figures = Text(
            f"loss {step.loss:.4f}  lr {step.learning_rate:.2e}  {tokens / seconds:,.0f} tokens/s  "
            f"memory {size(step.memory)}, peak {size(step.peak_memory)}"
        )
        curve = Text(sparkline(self.losses, min(60, self.console.width - 2)), style="green")
        self.live.update(Group(self.progress, figures, curve))
