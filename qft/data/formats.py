"""Row -> conversation, one pure function a format: which turns it holds. Raises BadRow with the reason."""

from collections.abc import Callable
from typing import Any

from qft.data.conversation import Conversation, Fields, Turn, conversation, message, parsed, text_alone
from qft.data.sources import BadRow


def from_messages(row: dict[str, Any]) -> Conversation:
    """OpenAI's chat format: {"messages": [{"role", "content"}, …], "tools": […]}."""
    fields = Fields(row)
    return conversation(fields, _messages(fields, "messages"))


def from_sharegpt(row: dict[str, Any]) -> Conversation:
    """{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", …}]}."""
    fields = Fields(row)
    name = "conversations" if "conversations" in fields else "conversation"
    return conversation(
        fields, [_turn(turn, f"{name}.{i}", _sharegpt_turn) for i, turn in enumerate(fields.turns(name))]
    )


SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant"}
SHAREGPT_ROLES |= {"assistant": "assistant", "tool": "tool", "observation": "tool", "function_call": "assistant"}


def _sharegpt_turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise BadRow(f"{where}: needs from and value")
    role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise BadRow(f"{where}.from: {turn['from']!r} is none of {', '.join(SHAREGPT_ROLES)}")
    made = {name: value for name, value in turn.items() if name not in ("from", "value")} | {"role": role}
    if turn["from"] == "function_call":
        return message(made | {"tool_calls": _function_calls(turn["value"], f"{where}.value")}, where, "value")
    return message(made | {"content": turn["value"]}, where, "value")


def _function_calls(value: Any, where: str) -> list[Any]:
    """The calls of a turn that is nothing else: {"name", "arguments"}, or a list of them, as JSON text or as it is."""
    calls = parsed(value, where) if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise BadRow(f"{where}: needs a call with name and arguments")
    return [{"type": "function", "function": call} for call in calls]


def from_prompt_completion(row: dict[str, Any]) -> Conversation:
    """{"prompt", "completion"}: two texts, one question and its answer, or two lists of messages."""
    fields = Fields(row)
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        questions = _messages(fields, "prompt") if prompt else []
        return conversation(fields, [*questions, *_messages(fields, "completion")])
    question, answer = fields.text("prompt"), fields.text("completion")
    return conversation(fields, _question("prompt", question, "completion", answer), plain=(question, answer))


def from_alpaca(row: dict[str, Any]) -> Conversation:
    """{"instruction", "input", "output"}, the input optional; it follows the instruction."""
    fields = Fields(row)
    question = fields.text("instruction")
    if more := fields.optional("input"):
        question += f"\n\n{more}"
    answer = fields.text("output")
    # Unlike a prompt, an instruction was not written to be gone on with.
    return conversation(fields, _question("instruction", question, "output", answer), (f"{question}\n\n", answer))


def from_text(row: dict[str, Any]) -> Conversation:
    """{"text"}: plain text, every token of which is learnt."""
    return text_alone(Fields(row))


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

JUDGED = ("label", "kto_tag")
"""What TRL and LLaMA-Factory call the field of rows that have a good or a bad answer."""
PREFERENCE = (
    "a preference (chosen beside rejected, or a label of true or false), and none are trained yet (DPO, ORPO, KTO): to "
    "learn the chosen answers alone, call them completion or messages by columns of the source, and name the others in "
    "data.ignore_fields"
)


def detect(row: dict[str, Any]) -> str:
    """Name of the format whose fields `row` has. Raises BadRow if none or several fit."""
    fitting = [name for name, fields in FIELDS.items() if fields <= row.keys()]
    if {"chosen", "rejected"} <= row.keys() or (set(fitting) - {"text"} and _is_judged(row)):
        raise BadRow(PREFERENCE)
    if len(fitting) == 1:
        return fitting[0]
    found = f"fields {', '.join(map(_shown, row)) or '(none)'}"
    if fitting:
        raise BadRow(f"{found} fit the formats {' and '.join(fitting)}; say which with data.format")
    known = "; ".join(f"{name} has {' and '.join(sorted(fields))}" for name, fields in FIELDS.items())
    raise BadRow(f"{found} fit no known format ({known}); rename them, or say which with data.format")


def _shown(name: Any) -> str:
    """A field's name, in quotes where spaces at its ends would not be seen."""
    return repr(name) if str(name) != str(name).strip() else str(name)


def _is_judged(row: dict[str, Any]) -> bool:
    """Whether it says if its answer is a good one: true or false, or as a file of texts has them."""
    return any(str(row.get(name)).lower() in ("true", "false") for name in JUDGED)


def _question(asks: str, question: str, answers: str, answer: str) -> list[Turn]:
    return [(asks, {"role": "user", "content": question}), (answers, {"role": "assistant", "content": answer})]


def _messages(fields: Fields, name: str) -> list[Turn]:
    return [_turn(item, f"{name}.{i}", message) for i, item in enumerate(fields.turns(name))]


def _turn(turn: Any, where: str, usual: Callable[[Any, str], Turn]) -> Turn:
    """One turn as its own fields say, whatever the list is called: {role, content} or {from, value}."""
    has_role, has_from = (isinstance(turn, dict) and name in turn for name in ("role", "from"))
    if has_role == has_from:
        return usual(turn, where)
    return message(turn, where) if has_role else _sharegpt_turn(turn, where)
