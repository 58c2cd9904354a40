"""What a row says, leaf by leaf, and whether a rendering says it too.

A chat template is a program that prints what its author thought of: a role, a field or a tool that it does not know
vanishes without a word. Each text, tool name, argument and definition is looked for in what was rendered, as it stands,
as JSON writes it, or with other white space. What is too short to be looked for (a digit stands anywhere), or says what
another leaf says too, is told by rendering the row once more with marks in the place of all leaves; rows of one
structure share the answer.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from qft.data.conversation import Conversation
from qft.data.sources import BadRow

Leaf = tuple[str, Any]
"""Its place in the row, and a text, number or boolean."""

NOT_SAID = frozenset({"role", "id", "tool_call_id", "type", "index"})
"""Fields of messages, calls and definitions that order the others, and that templates need not print."""
SHORTEST = 5
"""Characters of a leaf that is looked for as it stands."""
MARK = re.compile(r"zq\d+qz")
"""What stands in the place of a leaf."""
PART = 2**20
SCHEMA_WORDS = frozenset({"type", "required", "strict", "additionalProperties", "$schema"})
"""Of a JSON schema, what a template may branch on or put in other words."""


def leaves(conversation: Conversation) -> Iterator[Leaf]:
    """Every leaf that a model is to read or to learn."""
    if conversation.text is not None:
        yield "text", conversation.text
    for number, message in enumerate(conversation.messages):
        for name, value in message.items():
            if name not in NOT_SAID:
                yield from _within(value, conversation.place(number, name))
    for number, tool in enumerate(conversation.tools or ()):
        yield from _within(tool, f"tools.{number}")


def missing(conversation: Conversation, rendered: list[str], printed: Mapping[str, bool]) -> str | None:
    """Place of the first leaf that is in none of the texts `rendered`. `printed` tells of leaves, by their places,
    whether the template prints what stands there. Raises BadRow for a leaf that JSON cannot have."""
    texts = [_squeezed(text) for text in rendered]
    said = []
    for place, value in leaves(conversation):
        _require_json(place, value)
        said.append((place, value, _plain(value)))
    ends = [0] * len(texts)
    """In each text, where the leaf that was found there last ends: the next one most often follows."""
    for place, value, form in said:
        # Most stand there as they are.
        if not _found(form, texts, ends) and not any(_found(other, texts, ends) for other in _forms(value)):
            return place
        if printed.get(place, True):
            continue
        if not isinstance(value, str) or len(form) < SHORTEST:
            return place
        # It may be what another leaf says that was found.
        others = sum(other.count(form) for name, _, other in said if name != place)
        if max(text.count(each) for each in (form, *_forms(value)) for text in texts) <= others:
            return place
    return None


def _found(form: str, texts: list[str], ends: list[int]) -> bool:
    """Whether a text has it; keeps where it ends in the first that does."""
    for number, text in enumerate(texts):
        start = text.find(form, ends[number])
        if start < 0:
            start = text.find(form)
        if start >= 0:
            ends[number] = start + len(form)
            return True
    return False


def written_by_python(conversation: Conversation, rendered: list[str]) -> str | None:
    """Place of the first arguments of a call that stand in a text as Python writes an object, and not JSON."""
    for number, message in enumerate(conversation.messages):
        for i, call in enumerate(message.get("tool_calls") or ()):
            arguments = call["function"] if isinstance(call.get("function"), dict) else call
            given = arguments.get("arguments")
            if isinstance(given, dict) and given and any(str(given) in text for text in rendered):
                return f"{conversation.place(number, 'tool_calls')}.{i}"
    return None


def marked(conversation: Conversation) -> tuple[Conversation, dict[str, str]]:
    """The same row with a mark in the place of each leaf, and the marks by the leaves' places."""
    marks: dict[str, str] = {}
    messages = tuple(
        {n: v if n in NOT_SAID else _marked(v, conversation.place(i, n), marks) for n, v in message.items()}
        for i, message in enumerate(conversation.messages)
    )
    tools = conversation.tools and [_marked(tool, f"tools.{i}", marks) for i, tool in enumerate(conversation.tools)]
    return replace(conversation, messages=messages, tools=tools), marks


def structure(conversation: Conversation) -> str:
    """The same for all rows whose fields lie alike: roles, places, names and types, without what the leaves say."""
    roles = [message["role"] for message in conversation.messages]
    shapes = [_shape(message) for message in conversation.messages]
    switches = sorted(conversation.template_kwargs.items(), key=str)
    return repr((roles, conversation.places, shapes, _shape(conversation.tools), switches))


def _within(value: Any, place: str) -> Iterator[Leaf]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if _names_are_said(place):
                yield f"{place}.{name}", str(name)
            if not _unsaid(name, place):
                yield from _within(inner, f"{place}.{name}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _within(inner, f"{place}.{number}")
    elif value is not None and value != "":
        yield place, value


def _names_are_said(place: str) -> bool:
    """Whether the names of an object's fields are the user's own there, rather than words of the format."""
    return ".arguments" in place or place.endswith(".properties")


def _unsaid(name: str, place: str) -> bool:
    """Whether templates need not print the field `name` of the object at `place`."""
    return not _names_are_said(place) and (name in NOT_SAID or (name in SCHEMA_WORDS and place.startswith("tools.")))


def _marked(value: Any, place: str, marks: dict[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {n: v if _unsaid(n, place) else _marked(v, f"{place}.{n}", marks) for n, v in value.items()}
    if isinstance(value, list):
        return [_marked(inner, f"{place}.{i}", marks) for i, inner in enumerate(value)]
    if value is None or value == "":
        return value
    marks[place] = f"zq{len(marks)}qz"
    return marks[place]


def _shape(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _shape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_shape(inner) for inner in value]
    return bool(value) if isinstance(value, str) else type(value).__name__


def _plain(value: Any) -> str:
    """A leaf as it stands most often in a rendering."""
    return _squeezed(value if isinstance(value, str) else json.dumps(value))


def _require_json(place: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"{place}: {value} is no JSON number")
    if not isinstance(value, str | int | float):
        raise BadRow(f"{place}: needs a text or a number, not {type(value).__name__}")


def _forms(value: Any) -> list[str]:
    """How else it can stand there."""
    if not isinstance(value, str):
        return [_squeezed(str(value))]
    return [_squeezed(json.dumps(value, ensure_ascii=ascii_only)[1:-1]) for ascii_only in (False, True)]


def _squeezed(text: str) -> str:
    """Without white space, and without the escapes that JSON has for it: templates trim and indent."""
    for escape in ("\\n", "\\t", "\\r"):
        text = text.replace(escape, "")
    # In parts: a list of the words of a text takes many times its memory.
    return "".join("".join(text[start : start + PART].split()) for start in range(0, len(text), PART))
