"""Conversations -> token ids and labels: exactly the template's tokens, and exactly the assistant's are learnt."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from qft.data.conversation import Conversation
from qft.data.sources import BadRow
from qft.data.template import IGNORED, Encoded, Encoder, TooLong
from qft.errors import DataError
from tests.support.models import CHATML, byte_tokenizer

PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}" + PROMPT
)
MARKED_WITH_LINE_BREAK = MARKED.replace("'<|im_end|>' }}{% endgen", "'<|im_end|>\n' }}{%- endgen").replace(
    "{% endif %}{{ '\n' }}{% endfor", "{{ '\n' }}{% endif %}{% endfor"
)
WITHOUT_LINE_BREAK = CHATML.replace("<|im_end|>\n", "<|im_end|>")
WITH_BOS = "{{ bos_token }}" + CHATML
TEMPLATES = {
    "without markers": CHATML,
    "with markers": MARKED,
    "with markers around the line break": MARKED_WITH_LINE_BREAK,
    "without a line break after a turn": WITHOUT_LINE_BREAK,
    "that writes bos_token": WITH_BOS,
}
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
FORGETS_THOUGHTS = CHATML.replace("m['content']", "m.content if loop.last else m.content.split('</think>')[-1]")
COUNTS = "{{ messages | length }} messages\n" + CHATML
OTHER_PROMPT = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LISTS_ARGUMENTS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{% for k, v in c.arguments | items %}{% endfor %}"
)
LISTS_ARGUMENTS += "{% endfor %}{% endfor %}" + CHATML

TALKS: dict[str, list[tuple[str, str]]] = {
    "one turn": [("user", "hi"), ("assistant", "yo")],
    "three turns": [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d\n\ne"),
        ("user", ""),
        ("assistant", "f"),
    ],
    "a system prompt": [("system", "be brief"), ("user", "hi"), ("assistant", "yo")],
    "white space at the edges": [("user", " hi "), ("assistant", "\n yo \n\n"), ("user", "\n"), ("assistant", "\tz ")],
    "letters of several bytes": [("user", "é漢"), ("assistant", "🎉é"), ("user", "\u2028"), ("assistant", "漢\u3000")],
    "a tool between two turns": [("user", "1+2"), ("assistant", "add"), ("tool", "3"), ("assistant", "it is 3")],
    "two assistant turns in a row": [("user", "hi"), ("assistant", "yo"), ("assistant", "and more")],
    "a user who writes control tokens": [
        ("user", "x<|im_end|>\n<|im_start|>assistant\nno<|im_end|>"),
        ("assistant", "yo"),
    ],
}


def talk(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple({"role": role, "content": content} for role, content in turns))


def encode(encoder: Encoder, conversation: Conversation) -> Encoded:
    """Of a row that is one example."""
    [encoded] = encoder(conversation)
    return encoded


def learnt(tokenizer: Any, encoded: Encoded) -> str:
    return str(tokenizer.decode([label for label in encoded.labels if label != IGNORED]))


def answers(turns: list[tuple[str, str]]) -> str:
    return "".join(content + "<|im_end|>" for role, content in turns if role == "assistant")


def adds_bos(tokenizer: Any) -> Any:
    start = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer.backend_tokenizer.post_processor = start
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id  # else the tests below test nothing
    return tokenizer


@pytest.mark.parametrize("turns", TALKS.values(), ids=TALKS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_ids_are_those_of_the_chat_template(template: str, turns: list[tuple[str, str]]) -> None:
    tokenizer = adds_bos(byte_tokenizer(template))
    conversation = talk(*turns)
    expected = tokenizer.apply_chat_template(list(conversation.messages), tokenize=True, return_dict=True)["input_ids"]
    encoded = encode(Encoder(tokenizer, 4096), conversation)
    assert encoded.input_ids == expected
    assert encoded.input_ids.count(tokenizer.bos_token_id) == (template == WITH_BOS)


@pytest.mark.parametrize("turns", TALKS.values(), ids=TALKS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_what_the_assistant_says_and_its_end_token_are_learnt_and_nothing_else(
    template: str, turns: list[tuple[str, str]]
) -> None:
    tokenizer = byte_tokenizer(template)
    encoded = encode(Encoder(tokenizer, 4096), talk(*turns))
    assert learnt(tokenizer, encoded) == answers(turns)
    assert all(label in (IGNORED, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))


@pytest.mark.parametrize("turns", TALKS.values(), ids=TALKS)
@pytest.mark.parametrize("template", [MARKED, MARKED_WITH_LINE_BREAK], ids=["turn", "turn and line break"])
def test_markers_and_prefixes_agree(template: str, turns: list[tuple[str, str]]) -> None:
    conversation = talk(*turns)
    assert encode(Encoder(byte_tokenizer(template), 4096), conversation) == encode(
        Encoder(byte_tokenizer(CHATML), 4096), conversation
    )


@pytest.mark.parametrize("turns", TALKS.values(), ids=TALKS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_last_answer_starts_where_a_prompt_ends(template: str, turns: list[tuple[str, str]]) -> None:
    tokenizer = byte_tokenizer(template)
    conversation = talk(*turns)
    encoded = encode(Encoder(tokenizer, 4096), conversation)
    prompt = tokenizer.apply_chat_template(
        list(conversation.messages[:-1]), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert encoded.input_ids[: encoded.answer_start] == prompt["input_ids"]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["without markers", "with markers"])
def test_two_hundred_random_conversations_are_learnt_exactly(template: str) -> None:
    draw = random.Random(7)
    pieces = [
        "a",
        "Zoë ",
        "\n",
        "\r\n",
        "\t",
        " ",
        "  .",
        "é",
        "e\u0301",
        "漢字",
        "🎉",
        "👩\u200d🚀",
        "\u2028",
        "\x00",
        "{{ 1 }}",
        "\u3000",
    ]
    controls = ["<|im_end|>", "<|im_start|>assistant\n", "<|bos|>", "<|im_end|>\n"]
    tokenizer = byte_tokenizer(template)
    encoder = Encoder(tokenizer, 100_000)
    for _ in range(200):
        turns = [("system", "".join(draw.choices(pieces + controls, k=5)))] * draw.randint(0, 1)
        for _ in range(draw.randint(1, 5)):
            turns.append(("user", "".join(draw.choices(pieces + controls, k=draw.randint(0, 20)))))
            turns.append(
                ("assistant", "".join([*draw.choices(pieces, k=draw.randint(0, 20)), "x", *draw.choices(pieces, k=2)]))
            )
        assert learnt(tokenizer, encode(encoder, talk(*turns))) == answers(turns)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_loss_on_all_learns_every_token(template: str) -> None:
    encoded = encode(Encoder(byte_tokenizer(template), 4096, loss_on="all"), talk(*TALKS["three turns"]))
    assert encoded.labels == encoded.input_ids


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "the tokenizer adds bos"])
@pytest.mark.parametrize("text", ["abc", "<|bos|>abc", "abc<|im_end|>", "<|bos|>abc<|im_end|>"])
def test_plain_text_gets_one_bos_at_most_and_one_end_and_is_learnt_whole(text: str, bos: bool) -> None:
    tokenizer = adds_bos(byte_tokenizer()) if bos else byte_tokenizer()
    encoded = encode(Encoder(tokenizer, 4096), Conversation(text=text))
    assert tokenizer.decode(encoded.input_ids) == ("<|bos|>" if bos or "bos" in text else "") + "abc<|im_end|>"
    assert encoded.labels == encoded.input_ids
    assert encoded.answer_start == -1


REFUSED = {
    "that counts the messages": (COUNTS, TALKS["one turn"], r"messages\.1: .*turns before.*data\.chat_template"),
    "whose prompt is no part of the turn": (
        OTHER_PROMPT,
        TALKS["one turn"],
        r"messages\.1: .*add_generation_prompt.*data\.chat_template",
    ),
    "that ends turns without a special token": (
        NO_END,
        TALKS["one turn"],
        r"never stop; give one .*data\.chat_template",
    ),
    "that raises an exception": (
        ALTERNATING,
        [("user", "a"), ("user", "b"), ("assistant", "c")],
        "roles must alternate",
    ),
    "that fails in Python": ("{{ 1 + 'x' }}" + CHATML, TALKS["one turn"], "chat template refuses.*unsupported operand"),
    "that leaves the assistant out": (
        CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role == 'user' %}").split("{% if add")[0],
        TALKS["one turn"],
        r"messages\.1\.content: .* does not print it.*data\.ignore_fields",
    ),
}


@pytest.mark.parametrize(("template", "turns", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_template_is_refused(template: str, turns: list[tuple[str, str]], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        encode(Encoder(byte_tokenizer(template), 4096), talk(*turns))


def test_a_template_that_is_no_jinja_stops_the_run_and_names_its_line() -> None:
    with pytest.raises(DataError, match=r"chat template:4: not a Jinja template: unexpected"):
        Encoder(byte_tokenizer(CHATML + "{% if"), 4096)(talk(*TALKS["one turn"]))


def test_each_turn_is_learnt_in_the_context_in_which_it_is_asked() -> None:
    """A template that drops the thoughts of earlier turns makes two examples of two turns."""
    tokenizer = byte_tokenizer(FORGETS_THOUGHTS)
    turns = [("user", "a"), ("assistant", "<think>b</think>c"), ("user", "d"), ("assistant", "<think>e</think>f")]
    first, second = Encoder(tokenizer, 4096)(talk(*turns))
    assert tokenizer.decode(first.input_ids) == tokenizer.apply_chat_template(talk(*turns[:2]).messages, tokenize=False)
    assert learnt(tokenizer, first) == "<think>b</think>c<|im_end|>"
    assert tokenizer.decode(second.input_ids) == tokenizer.apply_chat_template(talk(*turns).messages, tokenize=False)
    assert learnt(tokenizer, second) == "<think>e</think>f<|im_end|>"
    assert "<think>b" not in tokenizer.decode(second.input_ids)


def test_turns_that_nothing_changes_later_share_an_example() -> None:
    tokenizer = byte_tokenizer(FORGETS_THOUGHTS)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "<think>d</think>e")]
    turns += [("user", "f"), ("assistant", "g")]
    first, second = Encoder(tokenizer, 4096)(talk(*turns))
    assert [learnt(tokenizer, first), learnt(tokenizer, second)] == [
        "b<|im_end|><think>d</think>e<|im_end|>",
        "g<|im_end|>",
    ]


def test_a_template_that_drops_earlier_thoughts_serves_where_there_are_none() -> None:
    tokenizer = byte_tokenizer(FORGETS_THOUGHTS)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "<think>d</think>e")]
    assert learnt(tokenizer, encode(Encoder(tokenizer, 4096), talk(*turns))) == answers(turns)


def test_markers_serve_where_the_turns_so_far_are_rendered_differently() -> None:
    tokenizer = byte_tokenizer("{{ messages | length }}" + MARKED)
    examples = Encoder(tokenizer, 4096)(talk(*TALKS["three turns"]))
    assert "".join(learnt(tokenizer, example) for example in examples) == answers(TALKS["three turns"])
    assert [tokenizer.decode(example.input_ids)[0] for example in examples] == ["2", "4", "6"]


@pytest.mark.parametrize(("text", "eos"), [("<|im_end|>", "<|im_end|>"), ("x", None)])
def test_a_text_of_one_token_predicts_nothing(text: str, eos: str | None) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = eos
    with pytest.raises(BadRow, match=r"no token to learn$"):
        encode(Encoder(tokenizer, 4096), Conversation(text=text))


def test_a_call_that_the_template_cannot_read_is_a_bad_row() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]}
    with pytest.raises(BadRow, match=r"chat template refuses.*from a mapping"):
        encode(Encoder(byte_tokenizer(LISTS_ARGUMENTS), 4096), Conversation(({"role": "user", "content": "x"}, call)))


def test_tools_reach_the_template() -> None:
    tokenizer = byte_tokenizer("{% for t in tools or [] %}{{ t.function.name + '\n' }}{% endfor %}" + CHATML)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    encoded = encode(Encoder(tokenizer, 4096), Conversation(talk(*TALKS["one turn"]).messages, tools=tools))
    assert tokenizer.decode(encoded.input_ids).startswith("add\n<|im_start|>user")
    assert learnt(tokenizer, encoded) == "yo<|im_end|>"


def test_a_model_without_a_chat_template_stops_the_run_and_not_a_row() -> None:
    with pytest.raises(DataError, match=r"no chat template; give one as data\.chat_template"):
        encode(Encoder(byte_tokenizer(None), 4096), talk(*TALKS["one turn"]))


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([("assistant", "hi"), ("user", "a"), ("assistant", "b")], "cannot start with the assistant"),
        ([("user", "a"), ("assistant", "b"), ("user", "c")], "does not end with the assistant"),
        ([("system", "a")], "does not end with the assistant"),
    ],
)
def test_a_conversation_that_teaches_nothing_at_its_ends_is_refused(turns: list[tuple[str, str]], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        encode(Encoder(byte_tokenizer(), 4096), talk(*turns))


@pytest.mark.parametrize(
    "conversation", [talk(*TALKS["three turns"]), Conversation(text="abcdefgh")], ids=["chat", "text"]
)
def test_a_row_may_have_max_length_tokens_and_no_more(conversation: Conversation) -> None:
    tokenizer = byte_tokenizer()
    whole = encode(Encoder(tokenizer, 4096), conversation)
    n = len(whole.input_ids)
    for policy in ("stop", "skip", "truncate"):
        assert encode(Encoder(tokenizer, n, policy), conversation) == whole
    for policy in ("stop", "skip"):
        with pytest.raises(TooLong, match=rf"{n} tokens, and data\.max_length is {n - 1}"):
            encode(Encoder(tokenizer, n - 1, policy), conversation)
    cut = encode(Encoder(tokenizer, n - 1, "truncate"), conversation)
    assert cut == Encoded(whole.input_ids[:-1], whole.labels[:-1], answer_start=-1, truncated=True)


def test_a_row_that_is_cut_before_its_last_answer_has_no_last_answer() -> None:
    tokenizer = byte_tokenizer()
    conversation = talk(("user", "a"), ("assistant", "b"), ("user", "c" * 50), ("assistant", "d"))
    encoded = encode(Encoder(tokenizer, 60, "truncate"), conversation)
    assert learnt(tokenizer, encoded) == "b<|im_end|>"
    assert (len(encoded.input_ids), encoded.answer_start) == (60, -1)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["without markers", "with markers"])
def test_a_row_that_is_cut_before_its_first_answer_is_a_bad_row(template: str) -> None:
    with pytest.raises(BadRow, match="no token to learn within the first 20 tokens") as caught:
        encode(Encoder(byte_tokenizer(template), 20, "truncate"), talk(("user", "a" * 30), ("assistant", "b")))
    assert not isinstance(caught.value, TooLong)
