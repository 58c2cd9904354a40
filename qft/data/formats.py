"""Row -> conversation, one pure function a format. Raises BadRow with the reason."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qft.data.sources import BadRow

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, or `text` for a row that has no turns."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: list[Any] | None = None


def from_messages(row: dict[str, Any]) -> Conversation:
    """OpenAI's chat format: {"messages": [{"role", "content"}, …], "tools": […]}."""
    messages = _messages(row, "messages")
    tools = row.get("tools") or None
    if tools and not _are_objects(tools):
        raise BadRow("tools: needs a list of JSON schemas")
    return Conversation(messages, tools=tools)


def from_sharegpt(row: dict[str, Any]) -> Conversation:
    """{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", …}]}."""
    turns = _list(row, "conversations" if "conversations" in row else "conversation")
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise BadRow(f"conversations.{i}: needs from and value")
        role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise BadRow(f"conversations.{i}.from: {turn['from']!r} is none of {', '.join(SHAREGPT_ROLES)}")
        messages.append(_message({"role": role, "content": turn["value"]}, f"conversations.{i}"))
    return Conversation((*_system(row), *messages))


SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant"}
SHAREGPT_ROLES |= {"assistant": "assistant", "tool": "tool"}


def from_prompt_completion(row: dict[str, Any]) -> Conversation:
    """{"prompt", "completion"}: two texts, one question and its answer, or two lists of messages."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return Conversation((*(_messages(row, "prompt") if prompt else ()), *_messages(row, "completion")))
    return Conversation(_question(_text(row, "prompt"), _text(row, "completion")))


def from_alpaca(row: dict[str, Any]) -> Conversation:
    """{"instruction", "input", "output"}, input and system optional; the input follows the instruction."""
    question = _text(row, "instruction")
    if row.get("input"):
        question += "\n\n" + _text(row, "input")
    turns = _question(question, _text(row, "output"))
    return Conversation((*_system(row), *turns))


def from_text(row: dict[str, Any]) -> Conversation:
    """{"text"}: plain text, every token of which is learnt."""
    return Conversation(text=_text(row, "text"))


FORMATS: dict[str, Callable[[dict[str, Any]], Conversation]] = {
    "messages": from_messages,
    "sharegpt": from_sharegpt,
    "prompt_completion": from_prompt_completion,
    "alpaca": from_alpaca,
    "text": from_text,
}

FIELDS = {
    "messages": {"messages"},
    "sharegpt": {"conversations"},
    "prompt_completion": {"prompt", "completion"},
    "alpaca": {"instruction", "output"},
    "text": {"text"},
}
"""The fields by which a format is known."""


def detect(row: dict[str, Any]) -> str:
    """Name of the format whose fields `row` has. Raises BadRow if none or several fit."""
    fitting = [name for name, fields in FIELDS.items() if fields <= row.keys()]
    if len(fitting) == 1:
        return fitting[0]
    found = f"fields {', '.join(map(str, row)) or '(none)'}"
    if fitting:
        raise BadRow(f"{found} fit the formats {' and '.join(fitting)}; say which with data.format")
    known = "; ".join(f"{name} has {' and '.join(sorted(fields))}" for name, fields in FIELDS.items())
    raise BadRow(f"{found} fit no known format ({known}); rename them, or say which with data.format")


def _question(question: str, answer: str) -> tuple[Message, ...]:
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


def _system(row: dict[str, Any]) -> tuple[Message, ...]:
    return ({"role": "system", "content": _text(row, "system")},) if row.get("system") else ()


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise BadRow(f"{name}: needs a text, not {type(value).__name__ if value is not None else 'nothing'}")
    if not value.strip():
        raise BadRow(f"{name}: is empty")
    return value


def _list(row: dict[str, Any], name: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name}: needs a list of turns")
    return value


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _messages(row: dict[str, Any], name: str) -> tuple[Message, ...]:
    return tuple(_message(message, f"{name}.{i}") for i, message in enumerate(_list(row, name)))


def _message(message: Any, where: str) -> Message:
    """One checked message; fields that hold nothing (a parquet file has them in every row) are dropped."""
    if not isinstance(message, dict):
        raise BadRow(f"{where}: needs role and content, not {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise BadRow(f"{where}.role: {role!r} is none of {', '.join(ROLES)}")
    if message.get("tool_calls") and not _are_objects(message["tool_calls"]):
        raise BadRow(f"{where}.tool_calls: needs a list of calls")
    if isinstance(content, list):
        content = _parts(content, where)
    if not isinstance(content, str) and not (role == "assistant" and message.get("tool_calls")):
        raise BadRow(f"{where}.content: needs a text")
    if role == "assistant" and not (content or "").strip() and not message.get("tool_calls"):
        raise BadRow(f"{where}.content: the assistant says nothing")
    return {k: v for k, v in message.items() if v is not None} | {"role": role, "content": content or ""}


def _parts(parts: list[Any], where: str) -> str:
    """Text of content that is a list of parts."""
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise BadRow(f"{where}.content: only parts of type text can be trained on")
    return "".join(part["text"] for part in parts)
