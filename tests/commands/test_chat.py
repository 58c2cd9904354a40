"""`qft chat`: what is answered, against generate itself; what a session does, and what is refused."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from typer.testing import CliRunner, Result

from qft.cli import app
from qft.commands.chat import Session
from qft.commands.conversation import ChatOptions, Conversation, _Writer
from qft.data.prepare import prepare
from qft.errors import DataError, QftError, RecipeError
from qft.recipe.load import from_values
from qft.views.words import CONTROLS
from tests.support.cli import qft
from tests.support.forked import command, fork
from tests.support.models import CHATML, byte_tokenizer, tiny_llama

RecipeFile = Callable[..., Path]
TOKENS = 24
LIMIT = ("--max-new-tokens", TOKENS)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def conversation(tokenizer: Any = None, positions: int | None = 512, **options: Any) -> Conversation:
    return Conversation(tokenizer or byte_tokenizer(), ChatOptions(**{"max_new_tokens": TOKENS} | options), positions)


def chat_ml(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns) + "<|im_start|>assistant\n"


def piped(text: str, *arguments: Any) -> Result:
    return CliRunner().invoke(app, ["chat", *map(str, arguments)], input=text, catch_exceptions=False)


def plain_answer(model: Any, text: str, **settings: Any) -> str:
    """What transformers alone says after `text`."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, return_tensors="pt").input_ids
    settings = {"do_sample": False, "max_new_tokens": TOKENS, "pad_token_id": 2} | settings
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist()
    return str(tokenizer.decode(out[: out.index(2)] if 2 in out else out))


# ------------------------------------------------------------------------------------------------------- conversation


def test_pieces_joined_are_the_whole_greedy_answer(model: Any) -> None:
    pieces: list[str] = []
    reply = conversation().ask(model, "Hi", pieces.append)
    assert reply.text == "".join(pieces) == plain_answer(model, chat_ml(("user", "Hi")))
    assert reply.text
    assert (reply.tokens, reply.interrupted) == (TOKENS, False)


@pytest.mark.parametrize("text", ["naïve café", "€ 𝄞 日本語", "👩‍👩‍👧", "a\ufffdb\ufffd"])
def test_a_character_of_several_tokens_is_shown_once_it_is_whole(text: str) -> None:
    tokenizer = byte_tokenizer()
    pieces: list[str] = []
    writer = _Writer(tokenizer, [2], pieces.append)
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    for tokens in (tokenizer("the prompt").input_ids, *([i] for i in ids), [2]):
        writer.put(torch.tensor(tokens))
    writer.end()
    assert "".join(pieces) == writer.text == text
    assert writer.ended
    if "\ufffd" not in text:
        assert pieces == list(text)


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    tokenizer = byte_tokenizer()
    pieces: list[str] = []
    writer = _Writer(tokenizer, [2], pieces.append)
    ids = tokenizer("x€").input_ids[:-1]
    for tokens in ([1], *([i] for i in ids)):
        writer.put(torch.tensor(tokens))
    assert pieces == ["x"]
    writer.end()
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not writer.ended


def test_the_second_turn_reads_the_first(model: Any) -> None:
    talk = conversation(system="Be brief.")
    first = talk.ask(model, "One?", lambda piece: None)
    ids = talk.prompt("Two?")
    said = [("system", "Be brief."), ("user", "One?"), ("assistant", first.text), ("user", "Two?")]
    assert talk.tokenizer.decode(ids) == chat_ml(*said)
    second = talk.ask(model, "Two?", lambda piece: None)
    assert second.text == plain_answer(model, chat_ml(*said))


def test_answers_end_where_the_template_ends_a_turn() -> None:
    """Even if neither the tokenizer nor the model says so."""
    model = tiny_llama(eos_token_id=None)
    model.generation_config.eos_token_id = None
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|bos|>"
    assert conversation(tokenizer).generation_config(model).eos_token_id == [0, 2]
    tokenizer.chat_template = None
    assert conversation(tokenizer).generation_config(model).eos_token_id == [0]


def test_an_answer_that_ends_itself_is_told_from_one_that_is_cut(model: Any) -> None:
    whole = conversation().ask(model, "Hi", lambda piece: None)
    assert not whole.ended
    letter = next(c for c in whole.text[1:] if c.isascii())
    stopping = tiny_llama().eval()
    stopping.generation_config.eos_token_id = byte_tokenizer()(letter).input_ids
    short = conversation().ask(stopping, "Hi", lambda piece: None)
    assert short.ended
    assert short.text == whole.text.partition(letter)[0]
    assert short.tokens < whole.tokens


def test_a_seed_repeats_what_is_drawn_and_greedy_reads_none(model: Any) -> None:
    def drawn(seed: int, **options: Any) -> str:
        set_seed(seed)
        return conversation(**options).ask(model, "Hi", lambda piece: None).text

    warm = {"temperature": 1.5, "top_p": 0.9}
    assert drawn(1, **warm) == drawn(1, **warm) != drawn(2, **warm)
    assert drawn(1) == drawn(2)
    set_seed(1)
    settings = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 0}
    assert drawn(1, **warm) == (set_seed(1), plain_answer(model, chat_ml(("user", "Hi")), **settings))[1]


def test_an_interrupt_keeps_what_was_said(model: Any) -> None:
    talk = conversation()
    pieces: list[str] = []

    def stop_after_three(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    reply = talk.ask(model, "Hi", stop_after_three)
    assert reply.interrupted
    assert reply.text.startswith("".join(pieces[:3]))
    assert reply.tokens < TOKENS
    assert talk.messages == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": reply.text}]


def test_an_interrupt_before_the_first_word_drops_the_question(model: Any) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    talk = conversation()
    hook = model.register_forward_pre_hook(interrupt)
    try:
        reply = talk.ask(model, "Hi", lambda piece: None)
    finally:
        hook.remove()
    assert (reply.text, reply.tokens, reply.interrupted, talk.messages) == ("", 0, True, [])


@pytest.mark.parametrize("options", [{}, {"system": "caf\udce9"}])
def test_bytes_that_are_no_text_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="not UTF-8 text"):
        conversation(**options).prompt("caf\udce9")


def test_without_a_template_the_text_goes_on(model: Any) -> None:
    talk = conversation(byte_tokenizer(chat_template=None))
    first = talk.ask(model, "Once", lambda piece: None)
    assert first.text == plain_answer(model, "Once")
    assert talk.tokenizer.decode(talk.prompt("Then")) == f"Once{first.text}\nThen"
    assert talk.row() == {"text": f"Once{first.text}"}
    with pytest.raises(DataError, match="no chat template"):
        talk.set_system("Be brief.")


def test_no_turn_is_dropped_to_make_room(model: Any) -> None:
    talk = conversation(positions=70)
    with pytest.raises(RecipeError, match=r"24 more, and the model was built for 70; lower --max-new-tokens"):
        talk.prompt("x" * 40)
    talk.ask(model, "Hi", lambda piece: None)
    before = list(talk.messages)
    with pytest.raises(RecipeError, match="/reset starts anew"):
        talk.ask(model, "Hi again", lambda piece: None)
    assert talk.messages == before


def test_an_answer_of_no_asked_length_has_the_room_that_there_is(model: Any) -> None:
    talk = conversation(positions=None, max_new_tokens=None)
    talk.prompt("Hi")
    assert talk.longest == 512
    positions = len(talk.prompt("Hi")) + 5
    talk = conversation(positions=positions, max_new_tokens=None)
    assert talk.ask(model, "Hi", lambda piece: None).tokens <= 5
    assert talk.longest == 5
    with pytest.raises(RecipeError, match=r"an answer one more at the least, .* built for \d+; /reset starts anew"):
        talk.ask(model, "Hi again", lambda piece: None)


def test_a_template_without_a_system_keeps_what_it_had() -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    talk = conversation(byte_tokenizer(refusing))
    with pytest.raises(DataError, match="the chat template refuses the conversation: no system"):
        talk.set_system("Be brief.")
    assert talk.prompt("Hi")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p"),
        ({"top_p": 0.5}, "nothing is drawn at temperature 0"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ChatOptions(**options)


# ------------------------------------------------------------------------------------------------------------ session


@pytest.fixture
def session(model: Any) -> Session:
    return Session(conversation(), model, note=lambda text: None)


def test_a_saved_conversation_is_a_row_that_training_reads(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "said.jsonl"
    for line in ("/system Be brief.", "Grüße", f"/save {path}", "/reset", "Again", f"/save {path}"):
        assert session.turn(line)
    first, second = (json.loads(line) for line in path.read_text("utf-8").splitlines())
    assert [turn["role"] for turn in first["messages"]] == ["system", "user", "assistant"]
    assert first["messages"][1]["content"] == "Grüße"
    assert second == session.conversation.row()
    recipe = from_values(
        {"model": {"path": "-"}, "data": {"train": str(path), "max_length": 512}, "output_dir": "-"}
    ).recipe
    rows = prepare(recipe.data, byte_tokenizer(), recipe.seed).train
    assert len(rows) == 2
    assert first["messages"][2]["content"] in byte_tokenizer().decode(rows[0]["input_ids"])


def test_saving_leaves_the_lines_before_alone(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "said.jsonl"
    path.write_text('{"messages": []}')
    session.turn("Hi")
    session.turn(f"/save {path}")
    assert len(path.read_text("utf-8").splitlines()) == 2
    assert path.read_text("utf-8").startswith('{"messages": []}\n')


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sing", "/sing: is none of /reset, /system, /image, /save, /help and /quit"),
        ("/save said.txt", "name a .jsonl file"),
        ("/save", "name a .jsonl file"),
        ("/save none.jsonl", "nothing was said yet"),
    ],
)
def test_commands_that_cannot_be_done(line: str, message: str, session: Session) -> None:
    with pytest.raises(QftError, match=message):
        session.turn(line)


def test_a_space_sends_a_slash_and_quit_ends(session: Session) -> None:
    assert session.turn(" /sing")
    assert session.conversation.messages[0]["content"] == "/sing"
    assert session.turn("")
    assert len(session.conversation.messages) == 2
    assert not session.turn("/quit")


# ------------------------------------------------------------------------------------------------------- command line


def test_one_answer_to_a_prompt_alone_on_standard_output(tiny_model: Path) -> None:
    result = qft("chat", f"{tiny_model}@float32", "--prompt", "Hi", *LIMIT)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert result.exit_code == 0
    assert result.stdout == plain_answer(model, chat_ml(("user", "Hi"))) + "\n"
    assert f"cut at --max-new-tokens {TOKENS}" in result.stderr


def test_json_is_one_document_and_nothing_else(tiny_model: Path) -> None:
    result = qft("chat", f"{tiny_model}@float32", "--prompt", "Hi", "--json", *LIMIT)
    document = json.loads(result.stdout)
    assert list(document) == ["prompt", "answer", "tokens", "seconds", "tokens_per_second"]
    assert (document["prompt"], document["tokens"]) == ("Hi", TOKENS)
    assert document["tokens_per_second"] == pytest.approx(TOKENS / document["seconds"])
    assert qft("chat", tiny_model, "--json").exit_code == 2


def test_each_piped_line_is_a_turn(tiny_model: Path, model: Any, tmp_path: Path) -> None:
    path = tmp_path / "said.jsonl"
    result = piped(f"One?\n\nTwo?\r\n/save {path}\n/quit\nThree?\n", f"{tiny_model}@float32", *LIMIT)
    assert result.exit_code == 0
    messages = json.loads(path.read_text("utf-8"))["messages"]
    assert [turn["content"] for turn in messages[::2]] == ["One?", "Two?"]
    assert result.stdout == "".join(turn["content"] + "\n" for turn in messages[1::2])
    crowded = piped("x" * 500 + "\nOne?\n", tiny_model, *LIMIT)
    assert (crowded.exit_code, crowded.stdout) == (2, "")
    failed = piped("/sing\nOne?\n", tiny_model, *LIMIT)
    assert (failed.exit_code, failed.stdout) == (2, "")
    assert "/sing: is none of" in failed.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_at_a_terminal_a_mistake_or_an_interrupt_does_not_end_the_conversation(tiny_model: Path, model: Any) -> None:
    import pty

    ours, theirs = pty.openpty()
    work = command("chat", f"{tiny_model}@float32", "--max-new-tokens", TOKENS)
    talk = fork(work, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = ""

    def wait_for(text: str) -> None:
        nonlocal shown
        while text not in shown:
            assert select.select([ours], [], [], 60)[0], f"no {text!r} in {shown!r}"
            shown += os.read(ours, 4096).decode(errors="replace")
        shown = shown.partition(text)[2]

    try:
        wait_for("> ")
        os.write(ours, b"/sing\n")
        wait_for("error: /sing: is none of")
        wait_for("> ")
        assert talk.pid
        os.kill(talk.pid, signal.SIGINT)
        os.write(ours, b"\n")  # a signal that comes just before readline waits is seen at the next key
        wait_for("[/quit or Ctrl-D leaves]")
        wait_for("> ")
        os.write(ours, b"Hi\n")
        answer = plain_answer(model, chat_ml(("user", "Hi")))
        assert "\x08" in answer
        wait_for(answer.translate(CONTROLS))
        wait_for("tokens/s")
        wait_for("> ")
        os.write(ours, b"\x04")
        talk.join(30)
        assert talk.exitcode == 0
    finally:
        talk.kill()
        talk.join()
        os.close(ours)


def test_a_recipe_brings_its_own_template_and_an_adapter_is_put_on(
    recipe_file: RecipeFile, tmp_path: Path, model: Any
) -> None:
    tokenizer = byte_tokenizer(chat_template=None)
    folder = tmp_path / "bare"
    base = tiny_llama()
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "chatml.jinja").write_text(CHATML)
    recipe = recipe_file(
        quant=None, model={"path": str(folder), "dtype": "float32"}, data={"chat_template": "chatml.jinja"}
    )
    talked = qft("chat", recipe, "--adapter", tmp_path / "adapter", "--prompt", "Hi", *LIMIT)
    assert talked.stdout == plain_answer(adapted.eval(), chat_ml(("user", "Hi"))) + "\n"
    assert "no chat template" not in talked.stderr
    bare = piped("Once\nThen\n", f"{folder}@float32", *LIMIT)
    assert bare.stdout.startswith(plain_answer(AutoModelForCausalLM.from_pretrained(folder), "Once") + "\n")
    assert bare.stderr.count("has no chat template: it continues what is written") == 1
    assert AutoTokenizer.from_pretrained(folder).chat_template is None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("{model}@nf5",), 2, "nf5 is none of the variants"),
        (("{model}@merged",), 2, "there is no adapter to merge"),
        (("{model}", "--adapter", "{here}"), 3, "holds no adapter"),
        (("{here}/none",), 3, "does not exist"),
        (("{model}", "--prompt", " "), 2, "the prompt is empty"),
        (("{model}", "--prompt", "x" * 500), 2, "the model was built for 512"),
        (("{model}", "--prompt", "Hi", "--top-p", "0.5"), 2, "nothing is drawn at temperature 0"),
    ],
)
def test_refusals_are_one_message_before_a_model_is_loaded(
    arguments: tuple[str, ...], code: int, message: str, tiny_model: Path, tmp_path: Path
) -> None:
    result = qft("chat", *(text.format(model=tiny_model, here=tmp_path) for text in arguments), *LIMIT)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert "loading" not in result.stderr
