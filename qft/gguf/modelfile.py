"""A Modelfile: what Ollama must know of a GGUF file, with the chat template in Ollama's own language.

Ollama renders a conversation with a Go template, not with the Jinja template in the file. One that puts each turn
between two fixed texts can be written for it exactly, and that is tried out; any other is left to Ollama's guess, and
the Modelfile says so. Source: docs/modelfile.md and docs/template.md of ollama/ollama.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from qft.data.sandbox import TemplateLimit

Message = dict[str, str]
ROLES = ("system", "user", "assistant")
LEFT_OUT = "# The chat template is more than turns between fixed texts: Ollama takes what it knows for it.\n"


@dataclass(frozen=True)
class Turns:
    """A chat template that puts each turn between two fixed texts."""

    start: str
    """What a conversation starts with, and llama.cpp does not add."""
    around: Mapping[str, tuple[str, str]]
    """What stands before and after a turn, by its role. No system: the template takes none."""
    answer: str
    """What an answer is written after."""
    system: str
    """What the system says where a conversation does not."""

    def render(self, messages: Sequence[Message]) -> str:
        """As Ollama does, with the prompt of an answer at the end."""
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return self.start + "".join(m["content"].join(self.around[m["role"]]) for m in messages) + self.answer


def modelfile(file: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a Modelfile beside the GGUF file of that name."""
    turns = find_turns(tokenizer) if tokenizer.chat_template is not None else None
    if turns and not _is_kept(turns.system):
        turns = None
    stops = [tokenizer.eos_token]
    text = f"FROM ./{file}\n"
    if turns:
        text += f'TEMPLATE """{_go_template(turns)}"""\n'
        text += f"SYSTEM {_quoted(turns.system)}\n" if turns.system else ""
        stops.insert(0, turns.around["assistant"][1].strip())
    elif tokenizer.chat_template is not None:
        text += LEFT_OUT
    return text + "".join(f"PARAMETER stop {_quoted(stop)}\n" for stop in dict.fromkeys(stops) if stop)


def find_turns(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """The fixed texts of the tokenizer's chat template, once they are found to render conversations as it does."""
    bos = tokenizer.bos_token or ""
    adds_bos = tokenizer.bos_token_id in tokenizer("a").input_ids
    # The same token can be what every conversation starts with, and what every turn does.
    for start in dict.fromkeys(["", bos]):
        template = partial(_render, tokenizer, start)
        try:
            found = _turns(template, "" if adds_bos else start)
            if all(found.render(talk) == found.start + template(talk, prompt=True) for talk in _talks(found)):
                return found
        except _NotTurns:
            continue
    return None


class _NotTurns(Exception):
    """The template is of another kind."""


def _render(tokenizer: Any, start: str, messages: Sequence[Message], *, prompt: bool = False) -> str:
    """As the chat template does, less what every conversation starts with."""
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except TemplateLimit:
        raise
    except Exception as error:  # templates refuse conversations in as many ways as there are authors
        raise _NotTurns from error
    return _less(text, start=start)


def _talks(turns: Turns) -> Iterator[list[Message]]:
    """Conversations of one, two and three questions, and the same with a system if the template takes one."""
    talk = [{"role": ROLES[1 + turn % 2], "content": f"words {turn}"} for turn in range(5)]
    for count in (1, 3, 5):
        yield talk[:count]
        if "system" in turns.around:
            yield [{"role": "system", "content": "be brief"}, *talk[:count]]


def _turns(template: Callable[..., str], start: str) -> Turns:
    one, two = [{"role": "user", "content": "Q1"}], [{"role": "assistant", "content": "A1"}]
    again = [{"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}]
    head, after_user = _split(template(one), "Q1")
    _, between, back, _, after_answer = _split(template([*one, *two, *again]), "Q1", "A1", "Q2", "A2")
    _, prompt = _split(template(one, prompt=True), "Q1")
    before_user = _less(back, start=after_answer)
    around = {"user": (before_user, after_user), "assistant": (_less(between, start=after_user), after_answer)}
    default = _less(head, end=before_user)
    try:
        before, rest, _ = _split(template([{"role": "system", "content": "S1"}, *one]), "S1", "Q1")
        around["system"] = (before, _less(rest, end=before_user))
    except _NotTurns:
        if default:
            raise
    if default:
        default = _less(default, start=around["system"][0], end=around["system"][1])
    return Turns(start, around, _less(prompt, start=after_user), default)


def _split(text: str, *contents: str) -> list[str]:
    """What stands before, between and after the contents."""
    parts = []
    for content in contents:
        before, found, text = text.partition(content)
        if not found:
            raise _NotTurns
        parts.append(before)
    return [*parts, text]


def _less(text: str, *, start: str = "", end: str = "") -> str:
    if not text.startswith(start) or not text.endswith(end) or len(text) < len(start) + len(end):
        raise _NotTurns
    return text[len(start) : len(text) - len(end)]


def _go_template(turns: Turns) -> str:
    """In the language of Go's text/template."""
    roles = [role for role in ROLES if role in turns.around]
    parts = [_literal(turns.start), "{{ range .Messages }}"]
    for number, role in enumerate(roles):
        before, after = map(_literal, turns.around[role])
        parts.append(f'{{{{ {"else " if number else ""}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}')
    return "".join([*parts, "{{ end }}{{ end }}", _literal(turns.answer)])


def _literal(text: str) -> str:
    """Text that is not read as an action, and that the Modelfile's quotes hold."""
    if "{{" not in text and _is_kept(text):
        return text
    signs = (sign if _is_kept(sign) else f"\\U{ord(sign):08x}" for sign in text)
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return f'{{{{ "{"".join(escapes.get(sign, sign) for sign in signs)}" }}}}'


def _is_kept(text: str) -> bool:
    """Whether quotes of a Modelfile can hold it: what Go does not print, it leaves out."""
    return '"""' not in text and all(sign.isprintable() or sign in "\n\r\t" for sign in text)


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
