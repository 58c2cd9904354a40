"""What a row says is in what the model reads, or the row is refused with the field's name."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest

from qft.data.conversation import Conversation, without_fields
from qft.data.formats import FORMATS
from qft.data.leaves import leaves
from qft.data.sources import BadRow, decode
from qft.data.template import IGNORED, Encoded, Encoder
from qft.errors import DataError
from qft.plan.template import set_template
from qft.recipe.data import DataSection
from tests.support.models import CHATML, byte_tokenizer
from tests.support.rows import chat

USER = {"role": "user", "content": "weather in Oslo?"}
ASSISTANT = {"role": "assistant", "content": "it is cold"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
HEAD = "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
BODY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "CALL{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
AS_JSON = HEAD + BODY.replace("CALL", "[{{ c.function.name }} {{ c.function.arguments | tojson }}]")
AS_TEXT = HEAD + BODY.replace("CALL", "{{ '[' + c.function.name + ' ' + c.function.arguments + ']' }}")
ONLY_NAMES = HEAD + BODY.replace("CALL", "[{{ c.function.name }}]")
THINKS = CHATML.replace("{{ m['content'] }}", "{{ (m.reasoning_content or '') + m.content }}")
SWITCH = CHATML.replace(
    "assistant\n{% endif", "assistant\n{% if not thinks %}<think></think>{% endif %}{% endif"
).replace(
    "{{ m['content'] }}", "{% if m.role == 'assistant' and not thinks %}<think></think>{% endif %}{{ m['content'] }}"
)


def called(arguments: Any, **fields: Any) -> dict[str, Any]:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call], **fields}


def encoded(template: str | None, row: dict[str, Any], name: str = "messages", **settings: Any) -> list[Encoded]:
    return Encoder(byte_tokenizer(template), 4096, **settings)(FORMATS[name](row))


def read(template: str | None, row: dict[str, Any], name: str = "messages", **settings: Any) -> str:
    [example] = encoded(template, row, name, **settings)
    return str(byte_tokenizer(template).decode(example.input_ids))


def with_defaults(template: str, **arguments: bool | float | str) -> str:
    tokenizer = byte_tokenizer(template)
    set_template(tokenizer, DataSection.model_validate({"template_kwargs": arguments}))
    return str(tokenizer.chat_template)


def learnt(example: Encoded) -> str:
    return str(byte_tokenizer().decode([label for label in example.labels if label != IGNORED]))


@pytest.mark.parametrize(
    "template", [AS_JSON, AS_TEXT], ids=["a template that writes JSON", "one that wants it written"]
)
@pytest.mark.parametrize(
    "arguments", [{"city": "Oslo", "days": 2}, '{"city": "Oslo", "days": 2}'], ids=["object", "text"]
)
def test_arguments_of_a_call_are_written_once(template: str, arguments: Any) -> None:
    assert '[get_weather {"city": "Oslo", "days": 2}]' in read(template, {"messages": [USER, called(arguments)]})


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("Oslo", r"messages\.1\.tool_calls\.0\.function\.arguments: not valid JSON"),
        ('{"a": 1, "a": 2}', r"messages\.1\.tool_calls\.0\.function\.arguments: not valid JSON: a: given twice"),
        ("[1]", r"messages\.1\.tool_calls\.0\.function\.arguments: needs a JSON object, not list"),
    ],
)
def test_arguments_that_are_no_object_are_refused(arguments: str, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        encoded(AS_JSON, {"messages": [USER, called(arguments)]})


VANISHES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a call": (CHATML, {"messages": [USER, called({"city": "Oslo"})]}, r"messages\.1\.tool_calls\.0\.function\.name"),
    "the arguments of a call": (
        ONLY_NAMES,
        {"messages": [USER, called({"city": "Oslo"})]},
        r"messages\.1\.tool_calls\.0\.function\.arguments\.city",
    ),
    "a short argument": (
        ONLY_NAMES,
        {"messages": [USER, called({"d": 1})]},
        r"messages\.1\.tool_calls\.0\.function\.arguments\.d",
    ),
    "the definition of a tool": (
        CHATML,
        {"messages": [USER, ASSISTANT], "tools": [TOOL]},
        r"tools\.0\.function\.name",
    ),
    "a thought": (
        CHATML,
        {"messages": [USER, ASSISTANT | {"reasoning_content": "Norway is north"}]},
        r"messages\.1\.reasoning_content",
    ),
    "a role": (
        CHATML.replace("for m in messages", "for m in messages if m.role != 'developer'"),
        {"messages": [{"role": "developer", "content": "be brief"}, USER, ASSISTANT]},
        r"messages\.0\.content",
    ),
    "a short text of a role": (
        CHATML.replace("for m in messages", "for m in messages if m.role != 'tool'"),
        {"messages": [USER, {"role": "tool", "content": "e"}, ASSISTANT]},
        r"messages\.1\.content",
    ),
    "the end of a text": (
        CHATML.replace("{{ m['content'] }}", "{{ m['content'][:9] }}"),
        {"messages": [USER, ASSISTANT]},
        r"messages\.0\.content",
    ),
}


@pytest.mark.parametrize(("template", "row", "field"), VANISHES.values(), ids=VANISHES)
def test_what_the_template_does_not_print_is_refused_by_name(template: str, row: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRow, match=f"^{field}: the chat template does not print .*data.chat_template"):
        encoded(template, row)


def test_what_the_template_prints_in_its_own_way_is_found() -> None:
    row = {"messages": [USER | {"content": " two\n\nlines\t"}, ASSISTANT | {"reasoning_content": 'say "é"'}]}
    trims = THINKS.replace("m.content", "m.content | trim").replace(
        "(m.reasoning_content or '')", "(m.reasoning_content | tojson if m.reasoning_content else '')"
    )
    assert "two\n\nlines" in read(trims, row)


def test_a_field_that_is_said_to_be_ignored_is_left_out() -> None:
    row = {"messages": [USER, ASSISTANT | {"reasoning_content": "hm"}], "tools": [TOOL], "id": 7}
    kept = without_fields(row, frozenset({"messages.reasoning_content", "tools"}))
    assert kept == {"messages": [USER, ASSISTANT], "id": 7}
    assert "hm" not in read(THINKS, kept)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": [USER, ASSISTANT]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        ("prompt_completion", {"prompt": "q", "completion": "a"}),
        ("prompt_completion", {"prompt": [USER], "completion": [ASSISTANT]}),
        ("alpaca", {"instruction": "q", "output": "a"}),
    ],
)
def test_what_stands_beside_the_turns_means_the_same_in_every_format(name: str, row: dict[str, Any]) -> None:
    beside = {"system": "be brief", "history": [["before", "then"]], "tools": [TOOL]}
    conversation = FORMATS[name](row | beside | {"id": 3, "score": None})
    plain = FORMATS[name](row)
    assert conversation.messages == (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "before"},
        {"role": "assistant", "content": "then"},
        *plain.messages,
    )
    assert conversation.tools == [TOOL]
    assert conversation.unread == {"id"}


def test_two_systems_that_differ_are_refused() -> None:
    row = {"messages": [{"role": "system", "content": "be kind"}, USER, ASSISTANT], "system": "be brief"}
    with pytest.raises(BadRow, match=r"^system: the turns begin with a system of their own"):
        FORMATS["messages"](row)
    assert len(FORMATS["messages"](row | {"system": "be kind"}).messages) == 3


@pytest.mark.parametrize("no", [{"weight": 0}, {"train": False}, {"weight": 0, "train": False}, {"weight": 0.0}])
def test_a_turn_of_no_weight_is_read_and_not_learnt(no: dict[str, Any]) -> None:
    row = {"messages": [USER, ASSISTANT | no, USER | {"weight": 0}, ASSISTANT | {"content": "still", "weight": 1}]}
    [example] = encoded(CHATML, row)
    assert learnt(example) == "still<|im_end|>"
    assert "it is cold" in byte_tokenizer().decode(example.input_ids)
    [whole] = encoded(CHATML, {"messages": [USER, ASSISTANT | no, USER, ASSISTANT]}, loss_on="all")
    assert learnt(whole).count("it is cold") == 1


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"weight": 1.5}, r"messages\.1\.weight: is a number from 0 to 1"),
        ({"weight": "1"}, r"messages\.1\.weight: is a number from 0 to 1"),
        ({"train": 0.5}, r"messages\.1\.train: is 0 or 1"),
        ({"train": "no"}, r"messages\.1\.train: is 0 or 1"),
        ({"weight": 1, "train": False}, r"messages\.1: weight and train contradict"),
        ({"weight": 0}, "no turn is learnt"),
    ],
)
def test_a_weight_that_means_nothing_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        encoded(CHATML, {"messages": [USER, ASSISTANT | fields]})


def test_a_user_cannot_be_learnt_alone() -> None:
    with pytest.raises(BadRow, match=r"messages\.0: only the assistant's turns are learnt"):
        encoded(CHATML, {"messages": [USER | {"weight": 1}, ASSISTANT]})


def test_arguments_of_the_template_come_from_the_recipe_and_from_the_row() -> None:
    row = {"messages": [USER, ASSISTANT]}
    assert "<think></think>" in read(SWITCH, row)
    assert "<think></think>" not in read(with_defaults(SWITCH, thinks=True), row)
    own = row | {"chat_template_kwargs": {"thinks": True}}
    assert "<think></think>" not in read(with_defaults(SWITCH, thinks=False), own)


@pytest.mark.parametrize(
    ("name", "row", "text"),
    [
        ("prompt_completion", {"prompt": "2+2=", "completion": "4"}, "2+2=4<|im_end|>"),
        ("prompt_completion", {"prompt": "2+2=", "completion": "4", "system": "Add."}, "Add.\n\n2+2=4<|im_end|>"),
        ("alpaca", {"instruction": "Add", "input": "2 and 2", "output": "4"}, "Add\n\n2 and 2\n\n4<|im_end|>"),
    ],
)
def test_without_a_template_the_answer_follows_the_question(name: str, row: dict[str, Any], text: str) -> None:
    [example] = encoded(None, row, name)
    assert byte_tokenizer().decode(example.input_ids) == text
    assert learnt(example) == "4<|im_end|>"
    assert byte_tokenizer().decode(example.input_ids[: example.answer_start]) == text.removesuffix("4<|im_end|>")


def test_turns_need_a_template() -> None:
    with pytest.raises(DataError, match=r"no chat template; give one as data\.chat_template"):
        encoded(None, {"messages": [USER, ASSISTANT]})


def test_columns_that_a_file_fills_are_absent_at_every_depth() -> None:
    row = {"messages": [USER | {"name": None}, called({"city": "Oslo", "days": None}, weight=None)], "tools": None}
    assert decode(row) == {"messages": [USER, {k: v for k, v in called({"city": "Oslo"}).items() if v is not None}]}
    written = {"__json__": json.dumps({"messages": [USER, called({"city": None})]})}
    decoded = decode(written)
    assert decoded is not None
    assert decoded["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": None}


@pytest.mark.parametrize(
    ("name", "row", "place"),
    [
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "mood": "glad"}]},
            r"conversations\.1\.mood",
        ),
        (
            "prompt_completion",
            {"prompt": [USER], "completion": [ASSISTANT | {"reasoning_content": "north"}]},
            r"completion\.0\.reasoning_content",
        ),
        ("alpaca", {"instruction": "q", "output": "a", "tools": [TOOL]}, r"tools\.0\.function\.name"),
    ],
)
def test_a_refusal_names_the_field_as_the_row_has_it(name: str, row: dict[str, Any], place: str) -> None:
    with pytest.raises(BadRow, match=f"^{place}: "):
        encoded(CHATML, row, name)


def test_what_another_field_says_too_is_still_missed() -> None:
    row = {"messages": [USER, ASSISTANT | {"reasoning_content": "it is cold"}]}
    with pytest.raises(BadRow, match=r"^messages\.1\.reasoning_content: "):
        encoded(CHATML, row)
    assert read(THINKS, row).count("it is cold") == 2


def test_arguments_are_never_written_as_python_writes_them() -> None:
    prints = HEAD + BODY.replace("CALL", "[{{ c.function.name }} {{ c.function.arguments }}]")
    assert '[get_weather {"city": "Oslo"}]' in read(prints, {"messages": [USER, called({"city": "Oslo"})]})


def test_a_function_call_of_sharegpt_is_a_call() -> None:
    turns = [
        {"from": "human", "value": "weather in Oslo?"},
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "-7"},
        {"from": "gpt", "value": "it is cold"},
    ]
    same = [USER, called({"city": "Oslo"}), {"role": "tool", "content": "-7"}, ASSISTANT]
    tools = json.dumps([TOOL])
    as_calls = {"messages": same, "tools": [TOOL]}
    assert read(AS_JSON, {"conversations": turns, "tools": tools}, "sharegpt") == read(AS_JSON, as_calls)


@pytest.mark.parametrize("field", ["system", "history", "tools", "chat_template_kwargs"])
def test_plain_text_has_nothing_beside_it(field: str) -> None:
    with pytest.raises(BadRow, match=f"^{field}: has no place in plain text.*data.ignore_fields"):
        FORMATS["text"]({"text": "a", field: "be brief"})


def test_without_a_template_a_tool_is_not_dropped() -> None:
    with pytest.raises(BadRow, match=r"^tools\.0\.function\.name"):
        encoded(None, {"prompt": "2+2=", "completion": "4", "tools": [TOOL]}, "prompt_completion")


def test_an_argument_of_a_row_that_the_template_does_not_read_is_refused() -> None:
    row = {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"think": True}}
    with pytest.raises(BadRow, match=r"^chat_template_kwargs\.think: the chat template reads nothing of that name"):
        encoded(SWITCH, row)


def test_the_question_asked_is_the_last_that_is_learnt() -> None:
    turns = [USER, ASSISTANT, USER, ASSISTANT | {"content": "warm", "weight": 0}]
    [example] = encoded(CHATML, {"messages": turns})
    decode_ids = byte_tokenizer().decode
    assert decode_ids(example.input_ids[example.answer_start :]).startswith("it is cold<|im_end|>")


WORDS = [
    "a",
    "0",
    "Oslo",
    'say "hi"',
    "é漢🎉",
    "two\n\nlines",
    "  edges ",
    "{{ x }}",
    "\\n",
    "<b>&amp;</b>",
    "true",
    "7",
]


def anything(draw: random.Random, depth: int = 2) -> Any:
    kinds = ["text", "number", "boolean", "nothing", *(["object", "list"] if depth else [])]
    match draw.choice(kinds):
        case "text":
            return draw.choice(WORDS)
        case "number":
            return draw.choice([0, 1, -3, 2.5, 10**12])
        case "boolean":
            return draw.random() < 0.5
        case "object":
            return {
                draw.choice("abcdef") * draw.randint(1, 6): anything(draw, depth - 1) for _ in range(draw.randint(0, 3))
            }
        case "list":
            return [anything(draw, depth - 1) for _ in range(draw.randint(0, 3))]
    return None


def any_turn(draw: random.Random, role: str) -> dict[str, Any]:
    made: dict[str, Any] = {"role": role, "content": draw.choice(WORDS)}
    if role == "assistant" and draw.random() < 0.4:
        arguments = {draw.choice(["city", "d", "länge"]): anything(draw) for _ in range(2)}
        given = json.dumps(arguments) if draw.random() < 0.5 else arguments
        made["tool_calls"] = [{"id": "1", "function": {"name": draw.choice(["f", "get_weather"]), "arguments": given}}]
    return made | {name: draw.choice(WORDS) for name in ("reasoning_content", "name") if draw.random() < 0.2}


def any_row(draw: random.Random) -> tuple[str, dict[str, Any]]:
    roles = [draw.choice(["system", "developer", "user", "tool"]), *["user", "assistant"] * draw.randint(1, 2)]
    turns = [any_turn(draw, role) for role in roles]
    froms = {"user": "human", "assistant": "gpt", "developer": "system"}
    spoken = [{"from": froms.get(t["role"], t["role"]), "value": t["content"]} | _beside(t) for t in turns]
    question, answer, more = (draw.choice(WORDS) for _ in range(3))
    history = [[draw.choice(WORDS), draw.choice(WORDS)]]
    tools = json.dumps([TOOL]) if draw.random() < 0.5 else [TOOL]
    beside = {"system": draw.choice(WORDS[2:]), "tools": tools, "history": history, "note": draw.choice(WORDS)}
    rows: dict[str, dict[str, Any]] = {
        "messages": {"messages": turns},
        "sharegpt": {"conversations": spoken},
        "prompt_completion": draw.choice(
            [{"prompt": question, "completion": answer}, {"prompt": turns[:-1], "completion": turns[-1:]}]
        ),
        "alpaca": {"instruction": question, "input": more, "output": answer},
        "text": {"text": question},
    }
    name = draw.choice(list(rows))
    return name, rows[name] | {field: value for field, value in beside.items() if draw.random() < 0.3}


def _beside(turn: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in turn.items() if name not in ("role", "content")}


def said(value: Any, name: str = "") -> Iterator[str]:
    """Every text that a raw row says, whatever qft makes of it."""
    if isinstance(value, str) and name in ("tools", "arguments"):
        value = json.loads(value)
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("role", "from", "id", "type", "note"):
                yield from said(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from said(inner, name)
    elif isinstance(value, str):
        yield value


def squeezed(text: str) -> str:
    return re.sub(r"\s|\\n|\\t|\\r", "", text)


@pytest.mark.parametrize("template", [CHATML, AS_JSON, AS_TEXT, ONLY_NAMES, THINKS])
def test_every_leaf_of_a_row_is_rendered_or_named(template: str) -> None:
    """Rows of all formats, drawn by chance: what is accepted holds every leaf, what is refused names one."""
    draw = random.Random(template)
    encoder = Encoder(byte_tokenizer(template), 100_000)
    rendered, refused = 0, []
    for _ in range(300):
        name, row = any_row(draw)
        try:
            conversation = FORMATS[name](row)
            examples = encoder(conversation)
        except BadRow as error:
            refused.append(str(error))
            continue
        rendered += 1
        texts = [squeezed(byte_tokenizer(template).decode(example.input_ids)) for example in examples]
        for value in said(row):
            forms = {value, json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1]}
            assert any(squeezed(form) in text for form in forms for text in texts), (value, row)
        assert conversation.unread == {"note"} & row.keys()
    assert rendered > 30
    assert all(re.search(r"^[\w.]+: |the chat template refuses", reason) for reason in refused)


def test_a_conversation_without_turns_has_one_leaf() -> None:
    assert list(leaves(Conversation(text="x"))) == [("text", "x")]


IN_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] | selectattr('type', 'equalto', "
    "'text') %}{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As templates for images have it: plain text is nothing to it."""


def test_a_template_that_takes_parts_alone_is_given_text_as_one() -> None:
    said = chat("what is it?", "a spider")["messages"]
    tokenizer, plain = byte_tokenizer(IN_PARTS), byte_tokenizer()
    assert "spider" not in tokenizer.apply_chat_template(said, tokenize=False)
    set_template(tokenizer, DataSection())
    set_template(plain, DataSection())
    for more in (False, True):
        texts = [t.apply_chat_template(said, tokenize=False, add_generation_prompt=more) for t in (tokenizer, plain)]
        assert texts[0] == texts[1]
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    assert tokenizer.apply_chat_template(parts, tokenize=False) == "<|im_start|>user\nwhat is it?<|im_end|>\n"
    assert plain.chat_template == CHATML
