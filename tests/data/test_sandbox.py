"""A chat template has a budget, and within it says what it says without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from qft.data import sandbox
from qft.data.sandbox import Sandbox, TemplateLimit, limit_templates
from qft.data.template import encode_prompt
from tests.support.cli import qft
from tests.support.models import CHATML, byte_tokenizer, tiny_llama
from tests.support.rows import chat, write_jsonl

NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set ns = namespace(s=START) %}{% for i in range(99) %}{% set ns.s = NEXT %}{% endfor %}{{ ns.s }}"
GROWS = {
    "repeated text": "{{ 'a' * 10**9 }}",
    "a count before its text": "{{ 10**9 * 'a' }}",
    "a list": "{{ ([0] * 10**9) | length }}",
    "doubled by +": DOUBLED.replace("START", "'a'").replace("NEXT", "ns.s + ns.s"),
    "doubled by ~": DOUBLED.replace("START", "'a'").replace("NEXT", "ns.s ~ ns.s"),
    "squared": DOUBLED.replace("START", "3").replace("NEXT", "ns.s * ns.s"),
    "a power": "{{ (10 ** (10 ** 9)) % 7 }}",
    "round": "{{ 1 | round(10 ** 9, 'ceil') }}",
    "a width": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '%1000000000d' | format(1) }}",
    "str.format": "{{ '{:>1000000000}'.format('a') }}",
    "a width that is given": "{{ '{:>{w}}'.format('a', w=2000000000) }}",
    "center": "{{ 'a' | center(2000000000) }}",
    "ljust": "{{ 'a'.ljust(2000000000) }}",
    "indent": "{{ 'a\nb' | indent(2000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list }}",
    "replace": "{% set a = 'a' * 1000000 %}{{ a | replace('a', a) }}",
    "join": "{% set a = 'a' * 1000000 %}{{ a | join(a) }}",
    "tojson": "{{ {'a': 1} | tojson(indent=2000000000) }}",
    "many small pieces": "{% for a in range(99999) %}{{ 'a' * 100000 }}{% endfor %}",
    "a block": "{% set x %}{% for a in range(99999) %}{{ 'a' * 100000 }}{% endfor %}{% endset %}{{ x }}",
}
LOOPS = {
    "ranges in ranges": NESTED,
    "loops that choose nothing": NESTED.replace("%}{% endfor", "if false %}{% endfor", 1),
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "filters": "{% for a in range(99999) %}{{ range(99999) | select | list | length }}{% endfor %}",
    "while it is compiled": "{{ [1] | slice(1000000000) | list | length }}",
    "lists in lists": DOUBLED.replace("START", "[]").replace("NEXT", "[ns.s, ns.s]"),
}
EVERYTHING = """
{%- macro field(name, value='none') %}{{ name | upper }}={{ value | tojson(indent=2) }};{{ caller() if caller }}
{%- endmacro -%}
{%- set ns = namespace(system='', n=0, seen=[]) -%}
{%- for m in messages if m.role != 'nobody' %}
    {%- if loop.first and m.role == 'system' %}{% set ns.system = m.content | trim %}{% continue %}{% endif -%}
    {%- set ns.n = ns.n + 1 %}{% set ns.seen = ns.seen + [m.role] -%}
    <{{ loop.index }}/{{ loop.length }} {{ loop.previtem.role if loop.previtem else '-' }} {{ loop.cycle('a', 'b') }}>
    {{- '%-8s|%3d' | format(m.role, ns.n) }}{{ '{:>6}'.format(m.role[:2]) }}{{ m.role.center(12) }}{{ '=' * 3 }}
    {%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{% for p in m.content.split(' ') %}[{{ p }}]
    {%- endfor %}
    {%- endgeneration %}{% else %}{{ m['content'] | replace('a', 'ä') | indent(2) }}{% endif -%}
    {% call field('x', {'k': [m.role, 1.5, none]}) %}inner{% endcall %}
    {%- if ns.n > 3 %}{% break %}{% endif %}
{% else %}nothing{%- endfor %}
{{- 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ 10 / 4 }}{{ 3 - 5 }}{{ 'a' ~ 1 ~ none }}{{ 2.567 | round(1) }}{{ [1, 2] * 2 }}
{%- for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor -%}
{{- undefined_name }}{% for x in undefined_name %}never{% else %}empty{% endfor %}{{ ns.seen | join(',') }}
{%- set block %}{% for i in range(3) %}{{ i }}{% endfor %}{% endset %}{{ block | length }}
{%- filter upper %}{{ ns.system }}{% endfilter %}{{ tools | tojson if tools }}{{ bos_token }}
"""
TALK = [
    {"role": "system", "content": " be brief "},
    {"role": "user", "content": "say\nanything"},
    {"role": "assistant", "content": "it is so"},
    {"role": "user", "content": "and again"},
    {"role": "assistant", "content": "no öther"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of a second rather than ten."""
    monkeypatch.setattr(sandbox, "SECONDS", 0.1)


@pytest.fixture
def without_budget() -> Iterator[None]:
    """transformers as it is."""
    chat_template_utils.ImmutableSandboxedEnvironment = ImmutableSandboxedEnvironment
    chat_template_utils._compile_jinja_template.cache_clear()
    yield
    limit_templates()


@pytest.mark.parametrize("template", [*GROWS.values(), *LOOPS.values()], ids=[*GROWS, *LOOPS])
@pytest.mark.usefixtures("briefly")
# The first alarm may find a finalizer under way, which loses it; the next comes a second later.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_template_that_does_not_end_is_one_message(template: str) -> None:
    with pytest.raises(TemplateLimit, match=r"the chat template (takes|writes|makes|computes) "):
        encode_prompt(byte_tokenizer(template), TALK)


@pytest.mark.parametrize("template", [EVERYTHING, CHATML], ids=["everything", "ChatML"])
@pytest.mark.parametrize("messages", [TALK, TALK[1:3]], ids=["a talk", "one turn"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
def test_within_the_budget_nothing_changes(
    template: str, messages: list[Any], tools: Any, request: pytest.FixtureRequest
) -> None:
    """The text, the tokens, and which of them the template marks as the assistant's."""
    tokenizer = byte_tokenizer(template)

    def rendered() -> list[Any]:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        if "generation" not in template:
            return [text]
        out = tokenizer.apply_chat_template(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
        return [text, out["input_ids"], out["assistant_masks"]]

    assert issubclass(chat_template_utils.ImmutableSandboxedEnvironment, Sandbox)
    limited = rendered()
    request.getfixturevalue("without_budget")
    assert limited == rendered()


def test_the_budget_is_of_one_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "STEPS", 150)
    tokenizer = byte_tokenizer("{% for a in range(9) %}{% for b in range(9) %}{% endfor %}{% endfor %}" + CHATML)
    texts = {tuple(encode_prompt(tokenizer, TALK)) for _ in range(3)}
    assert texts == {tuple(encode_prompt(byte_tokenizer(), TALK))}


@pytest.mark.usefixtures("briefly")
def test_check_and_chat_name_the_template(recipe_file: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(CHATML + NESTED)
    found = qft("check", recipe_file(data={"chat_template": "mine.jinja", "on_bad_row": "skip"}))
    assert found.exit_code == 5
    assert f"{tmp_path / 'mine.jinja'}: the chat template takes more than" in found.stderr
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer(CHATML + NESTED).save_pretrained(tmp_path / "model")
    spoken = qft("chat", tmp_path / "model", "--prompt", "hello")
    assert (spoken.exit_code, spoken.stdout) == (5, "")
    assert spoken.stderr.startswith("error: the chat template takes more than")


def test_a_deep_template_is_no_traceback(recipe_file: Any, tmp_path: Path) -> None:
    (tmp_path / "deep.jinja").write_text("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{**chat("a", "b"), "chat_template_kwargs": {"x": 1}}])
    found = qft("check", recipe_file(data={"chat_template": "deep.jinja", "train": str(rows)}))
    assert found.exit_code == 5
    assert "Traceback" not in found.stderr
