"""The documentation: tables that are whole, and files that are there; .ci/site.py looks at anchors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
ROW = re.compile(r"^\s*\|.*\|\s*$")
RULE = re.compile(r"^\s*\|(\s*:?-+:?\s*\|)+\s*$")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
NAMED = re.compile(r"`(?:docs|recipes|benchmarks)/[\w./-]+\.[a-z]+`")
FENCE = re.compile(r"^\s*(```|~~~)")


def cells(row: str) -> int:
    """Of a row; a `|` behind a backslash stands for itself."""
    return len(re.findall(r"(?<!\\)\|", row.strip())) - 1


def broken(text: str) -> Iterator[str]:
    """`line: what is wrong` for each table that does not come out as one: of rows without a head, of rows with more or
    fewer cells than that, and of rows that a line without cells cuts off."""
    lines = text.splitlines()
    inside, head = False, 0
    for number, line in enumerate(lines, 1):
        inside ^= bool(FENCE.match(line))
        if inside or not ROW.match(line):
            head = 0
            continue
        following = lines[number] if number < len(lines) else ""
        if not head and not RULE.match(following):
            yield f"{number}: a row that belongs to no table"
        head = head or cells(line)
        if cells(line) != head:
            yield f"{number}: {cells(line)} cells, and its head has {head}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_table_is_whole(page: Path) -> None:
    assert list(broken(page.read_text("utf-8"))) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text("utf-8")
    linked = [page.parent / link[1] for link in LINK.finditer(text)]
    named = [ROOT / name[0].strip("`") for name in NAMED.finditer(text)] if page.name != "CHANGELOG.md" else []
    assert [str(path) for path in (*linked, *named) if not path.exists()] == []


def test_what_is_no_whole_table_is_found() -> None:
    table = "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    assert list(broken(table)) == []
    assert list(broken(table + "\n| 3 | 4 |\n")) == ["5: a row that belongs to no table"]
    assert list(broken(table + "| 3 |\n")) == ["4: 1 cells, and its head has 2"]
    assert list(broken(table + r"| `a \| b` | 4 |" + "\n")) == []
    assert list(broken("```\n| no table |\n```\n")) == []
