"""What a data set's `type` says of its rows: their format, the names of their fields and the prompt around them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qft.arrive.line import Kind, Line
from qft.arrive.templates import prompt

_ALPACA = ("alpaca", "alpaca.jinja")
_ASKED = {"question": "instruction", "answer": "output"}
_ORCA = {"question": "instruction", "response": "output", "system_prompt": "system"}
TYPES: dict[str, tuple[str, str | None, Mapping[str, str]]] = {
    "alpaca": (*_ALPACA, {}),
    "alpaca:instruct": (*_ALPACA, {}),
    "alpaca:chat": ("alpaca", "alpaca-chat.jinja", {}),
    "alpaca:phi": ("alpaca", "alpaca-phi.jinja", {}),
    "alpaca:chatml": ("alpaca", "alpaca-chatml.jinja", {}),
    "alpaca_chat.load_qa": ("alpaca", "alpaca-concise.jinja", _ASKED),
    "alpaca_chat.load_concise": ("alpaca", "alpaca-concise.jinja", {}),
    "alpaca_chat.load_camel_ai": (
        "alpaca",
        "alpaca-concise.jinja",
        {"message_1": "instruction", "message_2": "output"},
    ),
    "alpaca_chat.load_no_prompt": ("alpaca", "alpaca-turns.jinja", {}),
    "alpaca_instruct.load_no_prompt": ("alpaca", "alpaca-unprompted.jinja", {}),
    "alpaca_w_system.load_instruct": ("alpaca", "alpaca-unprompted.jinja", {}),
    "alpaca_w_system.load": ("alpaca", "alpaca-turns.jinja", {}),
    "alpaca_w_system.load_chat": ("alpaca", "alpaca-turns.jinja", {}),
    "alpaca_w_system.load_open_orca": ("alpaca", "open-orca.jinja", _ORCA),
    "alpaca_w_system.load_open_orca_chatml": ("alpaca", "open-orca-chatml.jinja", _ORCA),
    "gpteacher": (*_ALPACA, {"response": "output"}),
    "completion": ("text", None, {}),
}
"""A type -> the rows' format, the chat template that writes its prompt, and fields that the format calls otherwise."""
WITH_INPUT = (
    "the prompt is that of rows without an input; an input follows the instruction after an empty line, without a "
    "heading of its own"
)
SHAREGPT = (
    "the chat template renders the turns; there FastChat's {conversation} did, of versions that still read the type"
)
NAMED = {"chatml": "chatml.jinja"}
"""Chat templates by what Axolotl calls them; any other is taken to be the model's own."""
CUT = "a longer text is cut into rows of sequence_len there; here it stops the run, and is to be cut before"
MESSAGES = {("role", "content"): ("messages", "messages"), ("from", "value"): ("sharegpt", "conversations")}
"""What role and content of a turn are called -> format, and the field that it has the turns in."""
RENAME = "qft reads turns of {'role', 'content'} or {'from', 'value'}: rename their fields in the rows"
UNREAD = (
    "the rows are read as their own fields say (format: auto), without that prompt: write them as messages (role and "
    "content), or as prompt and completion"
)
OWN_PROMPT = "prompt.jinja"
"""The chat template of a prompt that the configuration itself has."""


@dataclass(frozen=True)
class Form:
    """How rows are laid out."""

    line: Line
    format: str | None = None
    """None: seen from the rows."""
    template: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    """What the rows call a field -> what the format does."""

    @property
    def source(self) -> dict[str, Any]:
        """What it sets of a source."""
        made = {"format": self.format, "columns": dict(self.columns)}
        return {name: value for name, value in made.items() if value}


def form(key: str, dataset: Mapping[str, Any], named: str) -> Form:
    """The form of the data set at `key`; `named` is the chat template of those that name none."""
    kind, where = dataset.get("type"), f"{key}.type"
    if kind in ("chat_template", "chat_template.default"):
        return _turns(key, dataset, named)
    if str(kind).partition(":")[0] == "sharegpt":
        told = dataset.get("conversation") or "vicuna_v1.1"
        own = NAMED.get(str(told))
        line = Line(where, Kind.OTHER_FIELD if own else Kind.DECIDED, "" if own else SHAREGPT.format(conversation=told))
        turns = str(dataset.get("field_messages") or "conversations")
        return Form(line, "sharegpt", own, {} if turns == "conversations" else {turns: "conversations"})
    if isinstance(kind, Mapping):
        return _own(where, kind)
    if not isinstance(kind, str) or kind not in TYPES:
        return Form(Line(where, Kind.UNSUPPORTED, UNREAD))
    name, template, columns = TYPES[kind]
    if name == "text":
        other = dataset.get("field") or "text"
        columns = {} if other == "text" else {str(other): "text"}
    return Form(Line(where, Kind.OTHER_FIELD, CUT if name == "text" else ""), name, template, columns)


def _turns(key: str, dataset: Mapping[str, Any], named: str) -> Form:
    mapping = dataset.get("message_property_mappings") or {}
    role = mapping.get("role") or dataset.get("message_field_role") or "role"
    content = mapping.get("content") or dataset.get("message_field_content") or "content"
    others = {name: mine for name, mine in mapping.items() if name not in ("role", "content") and name != mine}
    if others or (role, content) not in MESSAGES:
        return Form(Line(f"{key}.field_messages", Kind.UNSUPPORTED, RENAME))
    name, turns = MESSAGES[role, content]
    asked = str(dataset.get("field_messages") or "messages")
    columns = {} if asked == turns else {asked: turns}
    template = NAMED.get(str(dataset.get("chat_template") or named))
    return Form(Line(f"{key}.type", Kind.OTHER_FIELD, f"format {name}"), name, template, columns)


def _own(where: str, kind: Mapping[str, Any]) -> Form:
    """A prompt of the configuration's own, around an instruction, an input and an output."""
    columns = {str(kind.get(f"field_{mine}") or mine): mine for mine in ("instruction", "input", "output")}
    columns = {name: mine for name, mine in columns.items() if name != mine}
    turn = str(kind.get("no_input_format") or kind.get("format") or "{instruction} ")
    text = prompt(
        turn.replace("{input}", ""), str(kind.get("system_format") or "{system}"), kind.get("system_prompt") or ""
    )
    placed = "{input}" in str(kind.get("format") or "")
    told = f"{WITH_INPUT}: write the prompt into the rows, as prompt and completion" if placed else WITH_INPUT
    line = Line(where, Kind.UNSUPPORTED if placed else Kind.OTHER_FIELD, told, templates={OWN_PROMPT: text})
    return Form(line, "alpaca", OWN_PROMPT, columns)
