"""What renders rows: the tokenizer's chat template, with the recipe's arguments as its defaults.

The defaults become a part of the template, and not of each call, so that a model is asked as it was trained wherever it
goes: in `qft chat`, in evaluations, and in the files that other engines load.
"""

import json
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from qft.data.rendering import reads
from qft.recipe.data import DataSection
from qft.recipe.section import Problem

PROBE = "a question"
PARTS = (
    "{% set said = namespace(messages=[]) %}{% for message in messages %}"
    "{% if message['content'] is string %}"
    "{% set message = dict(message, content=[{'type': 'text', 'text': message['content']}]) %}{% endif %}"
    "{% set said.messages = said.messages + [message] %}{% endfor %}{% set messages = said.messages %}"
)
"""In front of a template that reads what is said as parts: plain text becomes one."""


def template_problems(tokenizer: PreTrainedTokenizerBase, data: DataSection) -> Iterator[Problem]:
    """Arguments that no template reads."""
    templates = _templates(tokenizer)
    for name, _ in data.template_kwargs:
        if not any(reads(template, name) for template in templates.values()):
            yield (
                "data.template_kwargs",
                f"{name}: the chat template reads nothing of that name"
                if templates
                else (f"{name}: the model has no chat template; give one as data.chat_template"),
            )


def set_template(tokenizer: PreTrainedTokenizerBase, data: DataSection) -> None:
    """Make the tokenizer's template what the data section asks for."""
    defaults = "".join(
        f"{{% set {name} = {name} if {name} is defined else {_literal(value)} %}}"
        for name, value in data.template_kwargs
    )
    given = {name: text.removeprefix("\ufeff") for name, text in _templates(tokenizer).items()}
    made = {name: (PARTS if _wants_parts(tokenizer, text) else "") + defaults + text for name, text in given.items()}
    if data.template == "none":
        tokenizer.chat_template = None
    elif made:
        tokenizer.chat_template = made if isinstance(tokenizer.chat_template, dict) else made["default"]


def _wants_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a chat template prints what is said as parts, as those for images have it, and no plain text."""
    if "'type'" not in template and '"type"' not in template and ".type" not in template:
        return False

    def prints(content: Any) -> bool:
        try:
            messages = [{"role": "user", "content": content}]
            return PROBE in tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception:  # a template is a program: it can fail with more than jinja's own errors
            return False

    return not prints(PROBE) and prints([{"type": "text", "text": PROBE}])


def template_of(tokenizer: PreTrainedTokenizerBase, data: DataSection) -> str:
    """Of the Plan: `model`, a file, or `none`."""
    return data.chat_template or ("model" if tokenizer.chat_template else "none")


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """By their names, of which there may be several."""
    given: Any = tokenizer.chat_template
    return given if isinstance(given, dict) else {"default": given} if given else {}


def _literal(value: bool | float | str) -> str:
    return json.dumps(value, ensure_ascii=False)
