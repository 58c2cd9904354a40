"""Prompts of other tools as chat templates, for models that have none; each marks what the assistant writes.

The texts are those of Stanford's Alpaca, of ChatML and of the tools' own documentation. A beginning-of-text token is
written where the tokenizers that add one have it: where it is another than the end-of-text token.
"""

import json

_BOS = "{% if bos_token and bos_token != eos_token %}{{ bos_token }}{% endif %}"
_ANSWER = "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
_PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


def _template(system: str, user: str, assistant: str, start: str, first: str = "") -> str:
    """Jinja of the turns: each of these texts has {{ m.content }} in it; `first` stands for a missing system turn,
    `start` before an answer that is asked for."""
    default = "{% if messages[0].role != 'system' %}" + first + "{% endif %}" if first else ""
    return (
        f"{_BOS}{default}{{% for m in messages %}}"
        f"{{% if m.role == 'system' %}}{system}"
        f"{{% elif m.role == 'user' %}}{user}"
        f"{{% else %}}{start}{assistant}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{start}{{% endif %}}"
    )


def prompt(turn: str, system_format: str, system: str) -> str:
    """The template of a prompt with {instruction} in it, and {system} in what stands before; `system` is that of rows
    without one."""
    before = _literal(system_format.replace("{system}", system)) if system else ""
    said = _around(system_format, "{system}")
    return _template(said, _around(turn, "{instruction}"), _ANSWER, "", before)


def _around(text: str, place: str) -> str:
    return "{{ m.content }}".join(_literal(part) for part in text.split(place))


def _literal(text: str) -> str:
    """Jinja that writes `text`, whatever it has in it."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


ALPACA = _template(
    "{{ m.content }}\n\n", "### Instruction:\n{{ m.content }}\n\n", _ANSWER, "### Response:\n", f"{_PREAMBLE}\n\n"
)
ALPACA_CHAT = _template(
    "SYSTEM: {{ m.content }}\n", "USER: {{ m.content }}\n", _ANSWER, "ASSISTANT:", f"SYSTEM: {_PREAMBLE}\n"
)
CONCISE = (
    "Below is an instruction from a USER that describes a task. The ASSISTANT writes a response that appropriately and "
    "concisely completes the request.\n\n"
)
USER = "USER: {{ m.content }}\n"
ALPACA_CONCISE = _template("SYSTEM: {{ m.content }}\n", USER, _ANSWER, "ASSISTANT:", f"SYSTEM: {CONCISE}\n")
ALPACA_UNPROMPTED = _template(
    "### System:\n{{ m.content }}\n\n", "### Instruction:\n{{ m.content }}\n\n", _ANSWER, "### Response:\n"
)
ALPACA_TURNS = _template("SYSTEM: {{ m.content }}\n", USER, _ANSWER, "ASSISTANT:")
OPEN_ORCA = _template("### System:\n{{ m.content }}\n", "### Human:\n{{ m.content }}\n", _ANSWER, "### Assistant:\n")
ALPACA_PHI = _template(
    "<|system|>\n{{ m.content }}<|end|>\n",
    "<|user|>\n{{ m.content }}<|end|>\n",
    _ANSWER,
    "<|assistant|>\n",
    f"<|system|>\n{_PREAMBLE}<|end|>\n",
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALPACA_CHATML = "{% if messages[0].role != 'system' %}" + f"<|im_start|>system\n{_PREAMBLE}<|im_end|>\n" + (
    "{% endif %}" + CHATML.replace("'<|im_end|>' }}{% endgeneration %}", "eos_token }}{% endgeneration %}")
)  # fmt: skip
"""Its answers end with the tokenizer's end token."""
OPEN_ORCA_CHATML = CHATML.replace("'<|im_end|>' }}{% endgeneration %}", "eos_token }}{% endgeneration %}")

DEFAULT = _template(
    "System: {{ m.content }}{{ eos_token }}\n",
    "Human: {{ m.content }}{{ eos_token }}\n",
    f"{_ANSWER}\n",
    "Assistant:",
)
"""LLaMA-Factory's `default`."""
