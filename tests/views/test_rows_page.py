"""The page of `qft check --html`: what a person looks through before training, of rows that may say anything."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qft.documents.rows import ShownRow, ShownToken
from qft.views.html.rows_pictures import MOST, drawn
from tests.support.cli import qft
from tests.support.rows import chat, write_jsonl

RecipeFile = Callable[..., Path]
EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\x1b[31m\u202e"


class Page(HTMLParser):
    """Tags with their attributes, and the text within elements of a class or tag, those inside them included."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self._open.append((dict(attrs).get("class") or tag, []))

    def handle_endtag(self, tag: str) -> None:
        name, parts = self._open.pop()
        self.texts.append((name, "".join(parts)))
        if self._open:
            self._open[-1][1].extend(parts)

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1][1].append(data)

    def text(self, name: str) -> list[str]:
        return [text for found, text in self.texts if found == name]


@pytest.fixture
def page(recipe_file: RecipeFile, tmp_path: Path) -> Page:
    rows = [chat(EVIL, "said"), chat("ask", "one"), chat("ask", "one")]
    rows[1]["messages"][1]["weight"] = 0.5
    rows[1]["<b>note"] = 1
    main, other = write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "b.jsonl", [chat("x", "y")])
    held = write_jsonl(tmp_path / "held.jsonl", [chat("held", "out")])
    path = recipe_file(data={"train": [str(main), {"path": str(other), "weight": 3.0}], "eval": str(held)}, quant=None)
    found = qft("check", path, "--html", tmp_path / "rows.html")
    assert found.exit_code == 0, found.output
    assert "learnt" in found.stdout
    assert "said|" not in found.stdout, "rows are on the page, and not in the terminal"
    return Page((tmp_path / "rows.html").read_text("utf-8"))


def test_rows_are_inert_and_the_page_loads_nothing(page: Page) -> None:
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "object", "embed", "form", "input"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert all((attributes.get(name) or "#").startswith(("#", "data:,")) for name in ("href", "src"))
    policy = [attributes.get("content") for tag, attributes in page.tags if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_rows_are_shown_as_they_are_learnt(page: Page, tmp_path: Path) -> None:
    first, half, *_ = rows = page.text("tokens")
    assert len(rows) == 5, "three, one once though it is seen three times, and the one held out"
    assert "</pre><script>alert(1)</script>" in first
    assert "\x1b" not in first
    assert "\u241b[31m" in first
    assert "\u00d70.5one<|im_end|>" in half
    assert page.text("learnt")[1:] == [
        "said<|im_end|>",
        "\u00d70.5one<|im_end|>",
        "one<|im_end|>",
        "y<|im_end|>",
        "out<|im_end|>",
    ]
    assert page.text("place") == [
        *(f"{tmp_path / 'a.jsonl'}:{line}" for line in (1, 2, 3)),
        f"{tmp_path / 'b.jsonl'}:1",
        f"{tmp_path / 'held.jsonl'}:1",
    ]


def test_sources_findings_and_lengths_are_told(page: Page, tmp_path: Path) -> None:
    cells = [text for name in ("th", "td") for text in page.text(name)]
    assert {"duplicates", "control_characters", "unread fields", f"{tmp_path / 'a.jsonl'}:3"} <= set(cells)
    assert "nobody reads <b>note (1 row)" in cells
    assert "3x" in cells
    shares = [float(text[:-1]) for text in page.text("td") if re.fullmatch(r"[\d.]+%", text)]
    assert sum(shares[::2]) == pytest.approx(200, abs=1), "the shares of each part, beside what is learnt of a source"
    assert any("6 rows of at most" in text for text in page.text("desc"))


def test_a_long_row_is_not_shown_whole() -> None:
    tokens = [ShownToken("a", False, 0.0), *[ShownToken("b\n", True, 1.0)] * MOST]
    made = drawn(ShownRow(place="a:1", text="", learnt=[], pieces=tokens))
    assert [(run.learnt, run.weight, len(run.tokens)) for run in made.runs] == [
        (False, None, 1),
        (True, None, MOST - 1),
    ]
    assert made.left_out == 1
    assert made.runs[1].tokens[0] == "b\u21b5\n"


def test_only_rows_of_a_training_are_a_page(recipe_file: RecipeFile, tmp_path: Path) -> None:
    path = recipe_file(train=None, adapter=None, quant=None, calibrate={"engine": "rtn"})
    found = qft("check", path, "--html", tmp_path / "rows.html")
    assert found.exit_code == 2
    assert "--html" in found.stderr
    assert not (tmp_path / "rows.html").exists()


def test_the_page_comes_beside_json(recipe_file: RecipeFile, tmp_path: Path) -> None:
    found = qft("check", recipe_file(quant=None), "--html", tmp_path / "rows.html", "--json")
    document: dict[str, Any] = json.loads(found.stdout)
    assert document["shown"] == []
    assert sum(rows for _, rows in document["data"]["lengths"]["histogram"]) == 16
