"""By what pages and pictures of qft are known again, so that nothing else is replaced by them."""

from contextlib import suppress
from pathlib import Path

from qft.errors import RunError
from qft.files import write_text

PAGE = '<meta name="generator" content="qft">', '<a class="skip" href="#main">Skip to the figures</a>'
PICTURE = "<!-- qft report -->", ">qft&#160;report&#160;"
"""Either tells it: the second one of those from before there was a mark."""


def is_marked(path: Path, marks: tuple[str, str]) -> bool:
    """Whether the file has one of the marks."""
    with suppress(OSError, ValueError):
        text = path.read_text("utf-8")
        return any(mark in text for mark in marks)
    return False


def write_picture(path: Path, svg: str) -> None:
    """Write the tables of a report. Raises RunError if something else is there."""
    if path.exists() and not is_marked(path, PICTURE):
        raise RunError(f"{path}: is there and no picture of `qft report`, so it is not replaced; give another name")
    tag, end, rest = svg.partition(">")
    write_text(path, f"{tag}{end}{PICTURE[0]}{rest}")
