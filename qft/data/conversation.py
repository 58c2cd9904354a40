"""The one model of a row that all formats share, so that a field means the same in each.

A format says which turns a row holds. What may stand beside them is read here, for every format: `system`, `tools`,
`history` and `chat_template_kwargs` of a row; `content`, `tool_calls`, `weight` and `train` of a message.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qft.data.images import COLUMNS, Named, is_image, placed, taken
from qft.data.sources import BadRow, require_characters
from qft.files import read_json_text

Message = dict[str, Any]
Turn = tuple[str, Message]
"""Where a row says the content of a message (`messages.0.content`, `conversations.0.value`, `instruction`), and it."""
ROLES = ("system", "developer", "user", "assistant", "tool")
BESIDE = ("system", "history", "tools", "chat_template_kwargs")
"""Fields that may stand beside the turns of any format."""
LEARNT_BY = ("weight", "train")
"""Fields of a message that say whether it is learnt, or what it counts: 0 to 1, false or true."""


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, or `text` for a row that has no turns."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: list[Any] | None = None
    weights: tuple[float | None, ...] = ()
    """Of each message, what its row says that it counts, 0 to 1; None: as data.loss_on has it. Empty: none says."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """The row's own arguments of the chat template."""
    plain: tuple[str, str] | None = field(default=None, compare=False)
    """Question and answer as one text goes on, for a model without a chat template; None: the row has turns."""
    places: tuple[str, ...] = field(default=(), compare=False)
    """Of each message, where the row says its content. Empty: in `messages`."""
    images: tuple[Any, ...] = ()
    """Of each part that is an image, in their order, where the row names it and what; once read, its reference."""
    unread: frozenset[str] = field(default=frozenset(), compare=False)
    """Fields of the row that nobody reads."""

    def place(self, number: int, name: str = "content") -> str:
        """Where the row says the field `name` of message `number`."""
        content = self.places[number] if self.places else f"messages.{number}.content"
        return content if name == "content" else f"{content.rpartition('.')[0]}.{name}"

    def turn(self, number: int) -> str:
        """Where the row has message `number`."""
        content = self.place(number)
        return content.rpartition(".")[0] or content


class Fields:
    """A row that remembers which of its fields were asked for."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self._row = row
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._row

    def get(self, name: str) -> Any:
        self._read.add(name)
        return self._row.get(name)

    def unread(self) -> frozenset[str]:
        """Names of the others that hold anything."""
        return frozenset(str(n) for n, value in self._row.items() if n not in self._read and value not in (None, ""))

    def text(self, name: str) -> str:
        """Raises BadRow unless the field holds a text that is not blank."""
        value = self.get(name)
        if not isinstance(value, str):
            raise BadRow(f"{name}: needs a text, not {type(value).__name__ if value is not None else 'nothing'}")
        if not value.strip():
            raise BadRow(f"{name}: is empty")
        return value

    def optional(self, name: str) -> str | None:
        """The text of a field that may be blank or absent: None then. Raises BadRow for anything else."""
        value = self.get(name)
        return self.text(name) if value and not (isinstance(value, str) and value.isspace()) else None

    def parsed(self, name: str) -> Any:
        """The value, read as JSON where it is a text: files of columns hold lists and objects in that way."""
        value = self.get(name)
        is_json = isinstance(value, str) and value.lstrip().startswith(("[", "{"))
        return parsed(value, name) if is_json else value or None

    def turns(self, name: str) -> list[Any]:
        """Raises BadRow unless the field holds a list that is not empty."""
        value = self.parsed(name)
        if not isinstance(value, list):
            raise BadRow(f"{name}: needs a list of turns")
        return value


def parsed(text: str, where: str) -> Any:
    """The value of JSON text. Raises BadRow."""
    try:
        value = read_json_text(text)
        require_characters(value, text)
    except BadRow as error:
        raise BadRow(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where}: not valid JSON: {error}") from None
    return value


def conversation(fields: Fields, turns: Sequence[Turn], plain: tuple[str, str] | None = None) -> Conversation:
    """The turns of a row, with what stands beside them. Raises BadRow for what cannot be both."""
    history = _history(fields)
    turns = [*history, *turns]
    if system := fields.optional("system"):
        first = turns[0][1]
        has_own = first["role"] in ("system", "developer")
        if has_own and first["content"] != system:
            raise BadRow(f"system: the turns begin with a {first['role']} of their own; leave one of the two away")
        turns = [("system", {"role": "system", "content": system}), *turns[has_own:]]
        plain = plain and (f"{system}\n\n{plain[0]}", plain[1])
    weights = tuple(_weight(place, turn) for place, turn in turns)
    messages = [{name: value for name, value in turn.items() if name not in LEARNT_BY} for _, turn in turns]
    if column := _images(fields):
        messages = placed(messages, len(column))
    images = taken(messages, [place for place, _ in turns], column)
    return Conversation(
        tuple(messages),
        tools=_tools(fields),
        weights=weights if any(said is not None for said in weights) else (),
        template_kwargs=_template_kwargs(fields),
        plain=None if history or images else plain,  # turns have no one way to be a text
        places=tuple(place for place, _ in turns),
        images=tuple(images),
        unread=fields.unread(),
    )


def text_alone(fields: Fields) -> Conversation:
    """The row of a plain text. Raises BadRow for what only turns can have beside them."""
    text = fields.text("text")
    for name in BESIDE:
        if fields.get(name):
            raise BadRow(f"{name}: has no place in plain text; name it in data.ignore_fields to leave it out")
    return Conversation(text=text, places=("text",), unread=fields.unread())


def message(value: Any, where: str, content_name: str = "content") -> Turn:
    """One checked message; its content is called `content_name` in the row."""
    if not isinstance(value, dict):
        raise BadRow(f"{where}: needs role and {content_name}, not {type(value).__name__}")
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise BadRow(f"{where}.role: {role!r} is none of {', '.join(ROLES)}")
    calls = value.get("tool_calls")
    if calls and not _are_objects(calls):
        raise BadRow(f"{where}.tool_calls: needs a list of calls")
    if isinstance(content, list):
        content = _parts(content, f"{where}.{content_name}")
    if not isinstance(content, str | list) and not (role == "assistant" and calls):
        raise BadRow(f"{where}.{content_name}: needs a text")
    if role == "assistant" and not isinstance(content, list) and not (content or "").strip() and not calls:
        raise BadRow(f"{where}.{content_name}: the assistant says nothing")
    checked = {name: inner for name, inner in value.items() if inner is not None}
    if calls:
        checked["tool_calls"] = [_call(call, f"{where}.tool_calls.{i}") for i, call in enumerate(calls)]
    return f"{where}.{content_name}", checked | {"role": role, "content": content or ""}


def without_fields(value: Any, names: frozenset[str], place: str = "") -> Any:
    """`value` without the fields of these dotted names; a list's items stand under the name of the list."""
    if not names:
        return value
    if isinstance(value, list):
        return [without_fields(item, names, place) for item in value]
    if not isinstance(value, dict):
        return value
    places = {name: f"{place}.{name}" if place else str(name) for name in value}
    return {
        name: without_fields(inner, names, places[name]) for name, inner in value.items() if places[name] not in names
    }


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A call whose arguments are an object: OpenAI's API gives them as the text of one."""
    owner = call["function"] if isinstance(call.get("function"), dict) else call
    arguments = owner.get("arguments")
    if not isinstance(arguments, str):
        return call
    place = f"{where}.function.arguments" if owner is not call else f"{where}.arguments"
    value = parsed(arguments, place) if arguments.strip() else {}
    if not isinstance(value, dict):
        raise BadRow(f"{place}: needs a JSON object, not {type(value).__name__}")
    changed = owner | {"arguments": value}
    return call | {"function": changed} if owner is not call else changed


def _weight(place: str, turn: Message) -> float | None:
    """What weight and train of a message say. Raises BadRow for anything but a share, or for both."""
    said = [turn[name] for name in LEARNT_BY if name in turn]
    if not said:
        return None
    where = place.rpartition(".")[0]
    for name in LEARNT_BY:
        value = turn.get(name, 0)
        if not isinstance(value, int | float) or not 0 <= value <= 1 or (name == "train" and value not in (0, 1)):
            allowed = "a number from 0 to 1" if name == "weight" else "0 or 1"
            raise BadRow(f"{where}.{name}: is {allowed}, false or true, not {value!r}")
    if len({bool(value) for value in said}) > 1:
        raise BadRow(f"{where}: weight and train contradict each other")
    return float(said[0])


def _history(fields: Fields) -> list[Turn]:
    """Earlier turns: pairs of a question and its answer."""
    pairs = fields.parsed("history") or []
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise BadRow("history: needs a list of pairs, each of a question and its answer")
    return [
        (f"history.{i}.{j}", message({"role": role, "content": pair[j]}, f"history.{i}.{j}")[1])
        for i, pair in enumerate(pairs)
        for j, role in enumerate(("user", "assistant"))
    ]


def _tools(fields: Fields) -> list[Any] | None:
    tools: list[Any] | None = fields.parsed("tools")
    if tools and not _are_objects(tools):
        raise BadRow("tools: needs a list of JSON schemas")
    return tools


def _template_kwargs(fields: Fields) -> dict[str, Any]:
    value = fields.parsed("chat_template_kwargs") or {}
    if not isinstance(value, dict):
        raise BadRow("chat_template_kwargs: needs an object, the arguments of the chat template")
    return value


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _parts(parts: list[Any], where: str) -> str | list[Any]:
    """Content that is a list of parts: its text, or the parts themselves where some are images."""
    for number, part in enumerate(parts):
        is_text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not is_text and not is_image(part):
            raise BadRow(f"{where}.{number}: only parts of type text, image and image_url can be trained on")
    if any(map(is_image, parts)):
        return [dict(part) if is_image(part) else {"type": "text", "text": part["text"]} for part in parts]
    return "".join(part["text"] for part in parts)


def _images(fields: Fields) -> list[Named]:
    """The images that stand beside the turns."""
    found = list[Named]()
    for name in COLUMNS:
        value = fields.parsed(name) if name == "images" else fields.get(name)
        if isinstance(value, list):
            found += [(f"{name}.{number}", inner) for number, inner in enumerate(value)]
        elif value:
            found.append((name, value))
    return found
