"""Rows -> conversations: what each format makes of a row, why it refuses one, and how a format is known."""

from __future__ import annotations

from typing import Any

import pytest

from qft.data.conversation import Conversation
from qft.data.formats import FORMATS, detect
from qft.data.sources import BadRow

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}
SYSTEM = {"role": "system", "content": "be brief"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
PARTS = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": value} for role, value in pairs]}


GOOD: dict[str, tuple[str, dict[str, Any], Conversation]] = {
    "messages": ("messages", {"messages": [SYSTEM, USER, ASSISTANT]}, Conversation((SYSTEM, USER, ASSISTANT))),
    "messages whose white space is kept": (
        "messages",
        {"messages": [USER, {"role": "assistant", "content": " yo\n"}]},
        Conversation((USER, {"role": "assistant", "content": " yo\n"})),
    ),
    "messages of a developer and a tool": (
        "messages",
        {"messages": [{"role": "developer", "content": "x"}, {"role": "tool", "content": "3", "name": "add"}]},
        Conversation(({"role": "developer", "content": "x"}, {"role": "tool", "content": "3", "name": "add"})),
    ),
    "text parts, joined": (
        "messages",
        {"messages": [{"role": "user", "content": PARTS}, ASSISTANT]},
        Conversation((USER, ASSISTANT)),
    ),
    "tools and a call without content": (
        "messages",
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [TOOL]},
        Conversation((USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}), tools=[TOOL]),
    ),
    "fields of a parquet file that hold nothing": (
        "messages",
        {"messages": [USER | {"tool_calls": None, "name": None}, ASSISTANT | {"tool_calls": None}], "tools": None},
        Conversation((USER, ASSISTANT)),
    ),
    "sharegpt": ("sharegpt", turns(("human", "hi"), ("gpt", "yo")), Conversation((USER, ASSISTANT))),
    "sharegpt with a system field": (
        "sharegpt",
        turns(("human", "hi"), ("gpt", "yo")) | {"system": "be brief"},
        Conversation((SYSTEM, USER, ASSISTANT)),
    ),
    "sharegpt with an empty system field": (
        "sharegpt",
        turns(("human", "hi"), ("gpt", "yo")) | {"system": ""},
        Conversation((USER, ASSISTANT)),
    ),
    "messages as sharegpt has turns": (
        "messages",
        {"messages": turns(("human", "hi"), ("gpt", "yo"))["conversations"]},
        Conversation((USER, ASSISTANT)),
    ),
    "conversations of messages": (
        "sharegpt",
        {"conversations": [USER, ASSISTANT | {"weight": 0}]},
        Conversation((USER, ASSISTANT), weights=(None, 0.0)),
    ),
    "a blank system": ("messages", {"messages": [USER, ASSISTANT], "system": " "}, Conversation((USER, ASSISTANT))),
    "prompt and completion as texts": (
        "prompt_completion",
        {"prompt": "hi", "completion": "yo"},
        Conversation((USER, ASSISTANT)),
    ),
    "prompt and completion as messages": (
        "prompt_completion",
        {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]},
        Conversation((SYSTEM, USER, ASSISTANT)),
    ),
    "a completion of messages that needs no prompt": (
        "prompt_completion",
        {"prompt": [], "completion": [USER, ASSISTANT]},
        Conversation((USER, ASSISTANT)),
    ),
    "alpaca": ("alpaca", {"instruction": "hi", "output": "yo"}, Conversation((USER, ASSISTANT))),
    "alpaca with an empty input": (
        "alpaca",
        {"instruction": "hi", "input": "", "output": "yo", "system": ""},
        Conversation((USER, ASSISTANT)),
    ),
    "alpaca with a blank input": (
        "alpaca",
        {"instruction": "hi", "input": " \n", "output": "yo"},
        Conversation((USER, ASSISTANT)),
    ),
    "alpaca with an input": (
        "alpaca",
        {"instruction": "add", "input": "1 and 2", "output": "yo"},
        Conversation(({"role": "user", "content": "add\n\n1 and 2"}, ASSISTANT)),
    ),
    "alpaca with input and system": (
        "alpaca",
        {"instruction": "add", "input": "1 and 2", "output": "yo", "system": "be brief"},
        Conversation((SYSTEM, {"role": "user", "content": "add\n\n1 and 2"}, ASSISTANT)),
    ),
    "text": ("text", {"text": " a\nb\n"}, Conversation(text=" a\nb\n")),
}


@pytest.mark.parametrize(("name", "row", "conversation"), GOOD.values(), ids=GOOD)
def test_a_row_becomes_the_conversation_that_it_writes_down(
    name: str, row: dict[str, Any], conversation: Conversation
) -> None:
    assert FORMATS[name](row) == conversation


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("system", "system"),
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("assistant", "assistant"),
        ("tool", "tool"),
    ],
)
def test_a_sharegpt_speaker_has_a_role(theirs: str, ours: str) -> None:
    assert FORMATS["sharegpt"](turns((theirs, "x"))).messages == ({"role": ours, "content": "x"},)


def messages(*items: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": list(items), **fields}


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "no messages": ("messages", {"text": "x"}, "messages: needs a list of turns"),
    "messages that are a text": ("messages", {"messages": "hi"}, "messages: needs a list of turns"),
    "an empty list of messages": ("messages", messages(), "messages: needs a list of turns"),
    "a message that is a text": ("messages", messages("hi"), "messages.0: needs role and content, not str"),
    "a message without a role": ("messages", messages({"content": "hi"}), "messages.0.role: None is none of"),
    "an unknown role": ("messages", messages(USER, ASSISTANT | {"role": "bot"}), "messages.1.role: 'bot' is none of"),
    "a role that is a list": ("messages", messages(USER | {"role": ["user"]}), "messages.0.role: "),
    "no content": ("messages", messages({"role": "user"}), "messages.0.content: needs a text"),
    "content that is a number": ("messages", messages(USER | {"content": 7}), "messages.0.content: needs a text"),
    "a silent assistant": ("messages", messages(USER, ASSISTANT | {"content": " \n"}), "messages.1.content: .*nothing"),
    "an assistant without content": ("messages", messages(USER, {"role": "assistant"}), "messages.1.content: "),
    "a call by a user": ("messages", messages({"role": "user", "tool_calls": [CALL]}), "messages.0.content: "),
    "a picture": (
        "messages",
        messages(USER | {"content": [{"type": "image", "text": "x"}]}),
        "messages.0.content.0: names no image",
    ),
    "a part that is a text": ("messages", messages(USER | {"content": ["hi"]}), "messages.0.content.0: only .* text"),
    "a call that is a text": (
        "messages",
        messages(USER, ASSISTANT | {"tool_calls": "add(1)"}),
        "messages.1.tool_calls: ",
    ),
    "a list of texts as calls": (
        "messages",
        messages(USER, ASSISTANT | {"tool_calls": ["a"]}),
        "messages.1.tool_calls: ",
    ),
    "tools that are a text": ("messages", messages(USER, ASSISTANT, tools="none"), "tools: needs a list"),
    "tools that are texts": ("messages", messages(USER, ASSISTANT, tools=["add"]), "tools: needs a list"),
    "no turns": ("sharegpt", {"conversations": []}, "conversations?: needs a list of turns"),
    "a turn without a value": (
        "sharegpt",
        {"conversations": [{"from": "gpt"}]},
        "conversations.0: needs from and value",
    ),
    "an unknown speaker": ("sharegpt", turns(("human", "x"), ("bing", "y")), "conversations.1.from: 'bing' is none of"),
    "a speaker that is a list": ("sharegpt", turns((["gpt"], "y")), "conversations.0.from: "),  # type: ignore[arg-type]
    "a value that is a number": ("sharegpt", turns(("human", 7)), "conversations.0.value: needs a text"),
    "a system that is a number": ("sharegpt", turns(("human", "x")) | {"system": 7}, "system: needs a text, not int"),
    "no completion": ("prompt_completion", {"prompt": "hi"}, "completion: needs a text, not nothing"),
    "an empty prompt": ("prompt_completion", {"prompt": " ", "completion": "yo"}, "prompt: is empty"),
    "a list and a text": (
        "prompt_completion",
        {"prompt": [USER], "completion": "yo"},
        "prompt: needs a text, not list",
    ),
    "a completion without turns": (
        "prompt_completion",
        {"prompt": [USER], "completion": []},
        "completion: needs a list",
    ),
    "nothing but two empty lists": ("prompt_completion", {"prompt": [], "completion": []}, "completion: needs a list"),
    "a bad message in a completion": (
        "prompt_completion",
        {"prompt": [SYSTEM, USER], "completion": [ASSISTANT | {"role": "bot"}]},
        "completion.0.role: 'bot' is none of",
    ),
    "no instruction": ("alpaca", {"output": "yo"}, "instruction: needs a text, not nothing"),
    "an empty output": ("alpaca", {"instruction": "hi", "output": ""}, "output: is empty"),
    "an input that is a list": (
        "alpaca",
        {"instruction": "x", "input": [1], "output": "y"},
        "input: needs a text, not list",
    ),
    "no text": ("text", {"body": "x"}, "text: needs a text, not nothing"),
    "a text that is a number": ("text", {"text": 7}, "text: needs a text, not int"),
    "an empty text": ("text", {"text": "\n \n"}, "text: is empty"),
}


@pytest.mark.parametrize(("name", "row", "reason"), BAD.values(), ids=BAD)
def test_a_row_of_the_wrong_shape_says_which_field_and_why(name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=f"^{reason}") as caught:
        FORMATS[name](row)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "row", "conversation"), GOOD.values(), ids=GOOD)
def test_a_format_is_known_by_its_fields(name: str, row: dict[str, Any], conversation: Conversation) -> None:
    assert detect(row | {"id": 7}) == name


@pytest.mark.parametrize(
    ("row", "formats"),
    [
        ({"messages": [], "text": ""}, "messages and text"),
        ({"prompt": "", "completion": "", "text": ""}, "prompt_completion and text"),
        ({"instruction": "", "output": "", "conversations": []}, "sharegpt and alpaca"),
    ],
)
def test_a_row_that_fits_several_formats_must_be_told_which(row: dict[str, Any], formats: str) -> None:
    with pytest.raises(BadRow, match=f"fit the formats {formats}; say which with data.format") as caught:
        detect(row)
    assert all(field in str(caught.value) for field in row)


@pytest.mark.parametrize(
    "row", [{}, {"question": "", "answer": ""}, {"prompt": ""}, {"instruction": "", "response": ""}, {"TEXT": ""}]
)
def test_a_row_that_fits_no_format_is_told_of_all_of_them(row: dict[str, Any]) -> None:
    with pytest.raises(BadRow, match="fit no known format") as caught:
        detect(row)
    assert all(name in str(caught.value) for name in [*FORMATS, *row, "data.format"])
