"""What all views are made of: tables, facts, and lines that are never wrapped, since people copy from them."""

from collections.abc import Iterable, Sequence
from textwrap import wrap

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text


class Whole(Text):
    """A line that is never wrapped, cut or padded, if it is within a Group that is printed with crop=False."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Segment]:
        return self.render(console, end="\n")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(self.cell_len, self.cell_len)


class Prose:
    """A text that is wrapped between its words alone: a path in it stays whole."""

    def __init__(self, text: str, style: str = "") -> None:
        self.text, self.style = text, style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in _wrapped(self.text, options.max_width):
            yield Whole(line, self.style)


def _wrapped(text: str, width: int) -> list[str]:
    return wrap(text, max(width, 1), break_long_words=False, break_on_hyphens=False)


class Rows(Table):
    """A table with a title and a head, of 80 columns or more; with `unbroken` as wide as words such as paths need."""

    def __init__(self, title: str, *columns: str, unbroken: bool = False) -> None:
        super().__init__(
            title=Whole(title, "bold"),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 2, 0, 0),
        )
        self.unbroken = unbroken
        self.add_column(Text(columns[0]), style="cyan", overflow="fold")
        for name in columns[1:]:
            self.add_column(Text(name), justify="right", overflow="fold")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return super().__rich_console__(console, options.update(max_width=max(options.max_width, 80)))

    def add(self, *cells: str, style: str = "") -> None:
        """One more row, of plain text."""
        for column, cell in zip(self.columns, cells, strict=True):
            if self.unbroken:
                column.min_width = max([column.min_width or 0, *map(cell_len, cell.split())])
        self.add_row(*map(Text, cells), style=style)


class Facts:
    """A title, and names with what they are."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.rows: list[tuple[str, str | Whole]] = []

    def add(self, name: str, value: str | Whole) -> None:
        """One more name; `value` is wrapped as Prose is, unless it is Whole."""
        self.rows.append((name, value))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Whole(self.title, "bold")
        least = 22 if options.max_width >= 80 else 0
        left = max([least, *(len(name) for name, _ in self.rows)]) + 2
        for name, value in self.rows:
            lines: Sequence[str | Whole] = [value]
            if isinstance(value, str):
                lines = _wrapped(value, options.max_width - left)
            for i, line in enumerate(lines):
                yield Whole.assemble((("" if i else name).ljust(left), "cyan"), line)


def bullets(lines: Iterable[str], style: str = "") -> list[Prose]:
    return [Prose(f"• {line}", style) for line in lines]


def spaced(*parts: RenderableType) -> Group:
    """Each part after an empty line."""
    return Group(*(line for part in parts for line in ("", part)))
