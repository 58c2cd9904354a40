"""Rows as questions for whoever renders conversations itself: the messages up to the last answer, and that answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qft.data.conversation import Conversation, Message, without_fields
from qft.data.formats import FORMATS
from qft.data.reader import find_format, renamed
from qft.data.sources import BadRow, Rows, decode, open_source
from qft.errors import DataError
from qft.recipe import Source
from qft.recipe.data import DataSection


@dataclass(frozen=True)
class Question:
    """One row."""

    source: int
    row: int
    messages: tuple[Message, ...]
    """Up to the answer; empty where the row is asked as a text that is gone on with."""
    text: str
    """That text, or else what the last message says."""
    expected: str
    tools: list[Any] | None = None
    template_kwargs: Mapping[str, Any] | None = None

    @property
    def body(self) -> dict[str, Any]:
        """What of a request is the question."""
        if not self.messages:
            return {"prompt": self.text}
        tools = {"tools": self.tools} if self.tools else {}
        kwargs = {"chat_template_kwargs": dict(self.template_kwargs)} if self.template_kwargs else {}
        return {"messages": [_as_sent(message) for message in self.messages], **tools, **kwargs}


class NoText(BadRow):
    """A row whose answer is no text."""


def questions(
    data: DataSection, chosen: Mapping[int, Iterable[int] | None], sources: Mapping[int, Source], *, chat: bool
) -> tuple[list[Question], list[str]]:
    """Of each source, by its number, the rows of these indices (None: all that are not blank), and why others are left
    out: their answer is no text. `chat`: as messages, where the rows have them. Raises DataError for a row that cannot
    be asked, MissingError for a source that is not there."""
    made: list[Question] = []
    left_out: list[str] = []
    for number, indices in chosen.items():
        rows = open_source(sources[number])
        name = find_format(rows, data)
        for index in range(len(rows.dataset)) if indices is None else dict.fromkeys(indices):
            try:
                made += _question(rows, number, index, name, frozenset(data.ignore_fields), chat=chat)
            except NoText as error:
                left_out.append(f"{rows.place(index)}: {error}")
            except BadRow as error:
                raise DataError(f"{rows.place(index)}: {error}") from None
    if not made:
        raise DataError(f"no row can be asked: {left_out[0]}" if left_out else "there is no row to ask")
    return made, left_out


def _question(
    rows: Rows, source: int, index: int, name: str, ignored: frozenset[str], *, chat: bool
) -> Iterator[Question]:
    fields = decode(rows.dataset[index])
    if fields is None:  # a blank line
        return
    row = FORMATS[name](renamed(without_fields(fields, ignored), dict(rows.source.columns)))
    if row.text is not None:
        raise BadRow("plain text has no answer to score; give rows of questions and answers")
    if row.images:
        raise BadRow("rows with images are not asked over --url")
    if not chat and row.plain:
        yield Question(source, index, (), row.plain[0], row.plain[1])
        return
    at = _last_answer(row)
    message = row.messages[at]
    if message.get("tool_calls"):
        raise NoText("its answer calls a tool")
    before = row.messages[:at]
    text = str(before[-1]["content"]) if before else ""
    yield Question(source, index, before, text, str(message["content"]), row.tools, row.template_kwargs)


def _last_answer(row: Conversation) -> int:
    """Of the messages: the assistant's last that is learnt."""
    weights = row.weights or [None] * len(row.messages)
    answers = [i for i, turn in enumerate(row.messages) if turn["role"] == "assistant" and weights[i] != 0]
    if not answers or not answers[-1]:
        raise BadRow("holds no question that an assistant answers")
    return answers[-1]


def _as_sent(message: Message) -> Message:
    """As OpenAI's API takes it: arguments of calls are the text of an object."""
    calls = [_call(call) for call in message.get("tool_calls") or ()]
    return message | {"tool_calls": calls} if calls else message


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or {name: call[name] for name in ("name", "arguments") if name in call})
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
    return {"id": call.get("id", "call"), "type": "function", "function": function}
