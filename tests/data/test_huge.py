"""A row of megabytes, or of thousands of turns, is refused or cut by its beginning."""

from __future__ import annotations

from typing import Any

import pytest

from qft.data import template
from qft.data.formats import FORMATS
from qft.data.template import IGNORED, Encoded, Encoder, TooLong
from tests.support.models import byte_tokenizer
from tests.support.rows import chat

pytestmark = pytest.mark.usefixtures("bounded")

HUGE = 50_000_000


def encoded(format_: str, row: dict[str, Any], length: int = 64, **options: Any) -> list[Encoded]:
    return Encoder(byte_tokenizer(), length, **options)(FORMATS[format_](row))


ROWS = {
    "a text": ("text", {"text": "all of it " * (HUGE // 10)}),
    "an answer": ("messages", chat("why?", "a" * HUGE)),
    "a question": ("messages", chat("word\n" * (HUGE // 5), "so")),
    "characters of four bytes": ("messages", chat("why?", "a" * (HUGE // 4) + "\N{GRINNING FACE}")),
    "many turns": (
        "messages",
        {"messages": [turn for i in range(2000) for turn in chat(f"q{i}", f"a{i}")["messages"]]},
    ),
}


@pytest.mark.parametrize(("format_", "row"), ROWS.values(), ids=ROWS)
def test_it_is_too_long_by_its_beginning(format_: str, row: dict[str, Any]) -> None:
    with pytest.raises(TooLong, match=r"^(more than )?\d+ tokens, and data.max_length is 64$"):
        encoded(format_, row)


@pytest.mark.parametrize(
    ("format_", "row"),
    [("text", {"text": "tell it all " * 40}), ("messages", chat("why is it so?", "answer " * 60))],
    ids=["a text", "a chat"],
)
def test_what_is_cut_is_the_same_by_its_beginning(
    format_: str, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    [whole] = (
        encoded(format_, row, 16, on_too_long="truncate")
        if format_ == "text"
        else encoded(format_, row, 64, on_too_long="truncate")
    )
    monkeypatch.setattr(template, "LONG", 10)
    [cut] = encoded(format_, row, len(whole.input_ids), on_too_long="truncate")
    assert cut == whole
    assert cut.truncated
    assert any(label != IGNORED for label in cut.labels)


def test_a_huge_answer_is_cut() -> None:
    [cut] = encoded("messages", ROWS["an answer"][1], on_too_long="truncate")
    assert len(cut.input_ids) == 64
    assert cut.labels[-1] == cut.input_ids[-1]


def test_a_row_of_many_turns_that_fits_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"messages": [turn for i in range(20) for turn in chat(f"q{i}", f"a{i}")["messages"]]}
    counted = encoded("messages", row, 4096)
    monkeypatch.setattr(template, "MANY", 10**6)
    assert counted == encoded("messages", row, 4096)


@pytest.mark.parametrize("turns", [40, 8000])
def test_turns_that_are_cut_off_are_not_rendered_one_by_one(turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"messages": [turn for i in range(turns) for turn in chat(f"q{i}", f"a{i}" * (i % 5 + 1))["messages"]]}
    [cut] = encoded("messages", row, 512, on_too_long="truncate")
    assert cut.truncated
    assert len(cut.input_ids) == 512
    if turns == 40:
        monkeypatch.setattr("qft.data.rendering.FEW", turns)
        assert [cut] == encoded("messages", row, 512, on_too_long="truncate")
