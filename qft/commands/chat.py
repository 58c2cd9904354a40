"""`qft chat`: a conversation with one target, in the terminal, from a pipe, or one answer."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed
from transformers.generation.streamers import BaseStreamer

from qft.data.formats import FORMATS, Message
from qft.data.formats import Conversation as Row
from qft.data.sources import BadRow
from qft.data.template import Encoder, encode_prompt
from qft.errors import DataError, QftError, RecipeError, RunError
from qft.measure.scores import generation_config
from qft.memory.guard import memory_guard
from qft.model.target import load_target, parse_target

__all__ = ["ChatOptions", "Conversation", "Reply", "Session", "open_session"]

Show = Callable[[str], None]
"""Takes a piece of an answer as soon as it is known."""

UNFINISHED = "\ufffd"
"""What a decoder writes for the bytes of a character that is not whole yet."""

CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
CONTROLS |= {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)
"""What to show for the characters by which a text could command a terminal."""

HELP = """\
/reset        forget all turns; what the system says stays
/system TEXT  what the system says; without TEXT, nothing
/save FILE    append the conversation to FILE.jsonl, as a row that training reads
/quit         leave, as does Ctrl-D; Ctrl-C ends an answer and keeps what was said
A line that starts with a space is never a command."""


@dataclass(frozen=True)
class ChatOptions:
    """What the command line says beside the target. Raises RecipeError for what means nothing."""

    system: str | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float | None = None
    """Draw from the most likely tokens that make up this share of the probability; None: from all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise RecipeError(f"--temperature {self.temperature}: is 0 (the most likely token) or above")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise RecipeError(f"--top-p {self.top_p}: is a share above 0, and at most 1")
        if self.top_p is not None and not self.temperature:
            raise RecipeError("--top-p: nothing is drawn at temperature 0; give --temperature too")


@dataclass(frozen=True)
class Reply:
    """One answer."""

    text: str
    tokens: int
    """Tokens written, without the end of turn."""
    seconds: float
    """From the question to the last token."""
    ended: bool
    """Whether the model ended its turn, rather than --max-new-tokens."""
    interrupted: bool = False

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


@dataclass
class Conversation:
    """Messages, rendered with the model's chat template; without one, a text that the model continues.

    `max_positions` is the longest sequence, in tokens, that the model was built for; None if it does not say."""

    tokenizer: PreTrainedTokenizerBase
    options: ChatOptions
    max_positions: int | None = None
    messages: list[Message] = field(init=False, default_factory=list)
    """The turns so far, without what the system says."""
    system: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.options.system:
            self.set_system(self.options.system)

    @property
    def has_template(self) -> bool:
        return self.tokenizer.chat_template is not None

    def set_system(self, text: str | None) -> None:
        """Change what the system says, for the turns so far too. Raises DataError if the template takes none."""
        if text and not self.has_template:
            raise DataError("the model has no chat template, so there is no system to speak; see data.chat_template")
        before, self.system = self.system, text or None
        try:
            self._render("Hello")
        except DataError:
            self.system = before
            raise

    def prompt(self, text: str) -> list[int]:
        """Token ids of all turns and then `text`, up to where the answer begins.

        Raises DataError for what cannot be rendered, RecipeError if the model has no room for it and the answer."""
        if not text.strip():
            raise RecipeError("there is nothing to answer: the prompt is empty")
        ids = self._render(text)
        room, wanted = self.max_positions, self.options.max_new_tokens
        if room is not None and len(ids) + wanted > room:
            remedy = "/reset starts anew (no turn is dropped by itself), or lower" if self.messages else "lower"
            raise RecipeError(
                f"the conversation takes {len(ids)} tokens and --max-new-tokens {wanted} more, and the model was built "
                f"for {room}; {remedy} --max-new-tokens"
            )
        return ids

    def ask(self, model: Any, text: str, show: Show) -> Reply:
        """The answer to `text`, each piece of which goes to `show` at once. Both become turns of the conversation,
        unless the answer is interrupted before it begins. Raises what `prompt` does, or OutOfMemoryError."""
        ids = self.prompt(text)
        settings = self.generation_config(model)
        writer = _Writer(self.tokenizer, settings.eos_token_id, show)
        input_ids = torch.tensor([ids], device=next(model.parameters()).device)
        started, interrupted = time.perf_counter(), False
        try:
            with memory_guard("answering", SMALLER_CHAT), torch.inference_mode():
                model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    generation_config=settings,
                    streamer=writer,
                )
        except KeyboardInterrupt:
            interrupted = True
            writer.end()
        seconds = time.perf_counter() - started
        if writer.text or not interrupted:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": writer.text}]
        return Reply(writer.text, len(writer.ids), seconds, ended=writer.ended, interrupted=interrupted)

    def generation_config(self, model: Any) -> GenerationConfig:
        """Stops as those of `qft eval`; greedy too, or drawn as the options say."""
        settings = generation_config(model, self.tokenizer, self.options.max_new_tokens, self._rendered_row())
        if self.options.temperature:
            settings.do_sample, settings.temperature = True, self.options.temperature
            settings.top_p = 1.0 if self.options.top_p is None else self.options.top_p
            settings.top_k = 0  # else 50, or the model's own: nothing that was asked for
        return settings

    def row(self) -> dict[str, Any]:
        """The conversation as training reads it. Raises DataError while there is nothing to learn in it."""
        row: dict[str, Any]
        if self.has_template:
            name, row = "messages", {"messages": self._all_messages()}
        else:
            name, row = "text", {"text": self._text("").rstrip("\n")}
        try:
            if not self.messages:
                raise BadRow("nothing was said yet")
            FORMATS[name](row)
        except BadRow as error:
            raise DataError(f"/save: {error}") from None
        return row

    def _render(self, text: str) -> list[int]:
        try:
            f"{self.system}{text}".encode()
        except UnicodeEncodeError:
            raise DataError("what was typed is not UTF-8 text") from None
        if self.has_template:
            return encode_prompt(self.tokenizer, [*self._all_messages(), {"role": "user", "content": text}])
        ids = list(self.tokenizer(self._text(text)).input_ids)
        return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def _all_messages(self) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    def _text(self, more: str) -> str:
        """The conversation as one text: answers follow what they answer directly, and end their line."""
        ends = {"user": "", "assistant": "\n"}
        return "".join(turn["content"] + ends[turn["role"]] for turn in self.messages) + more

    def _rendered_row(self) -> list[int]:
        """Labels of a row of one question and one answer, by whose last token the template ends a turn."""
        if not self.has_template:
            return []
        turns = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"})
        try:
            return Encoder(self.tokenizer, max_length=sys.maxsize)(Row(turns)).labels
        except BadRow:
            return []  # no row can be learnt through such a template, so no model has learnt its end of turn


SMALLER_CHAT = "Start anew with /reset, lower --max-new-tokens, or hold the base in fewer bits (TARGET@nf4)"


class _Writer(BaseStreamer):
    """Takes tokens as they are generated and shows their text, holding back characters that are not whole yet."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: list[int], show: Show) -> None:
        self.tokenizer, self.stops, self.show = tokenizer, stops, show
        self.ids: list[int] = []
        self.text = ""
        self.ended = False
        self._prompt_is_next = True
        self._start = self._shown = 0  # tokens whose text was shown; those from _start on are its context

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, which is not shown, then one token a call."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        for token in value.flatten().tolist():
            self.ended = self.ended or token in self.stops
            if not self.ended:
                self.ids.append(token)
                self._write(whole=False)

    def end(self) -> None:
        """Show what was held back; nothing more comes."""
        self._write(whole=True)

    def _write(self, *, whole: bool) -> None:
        # Some decoders write a token otherwise where a text begins: so each is decoded behind those before it.
        known = self.tokenizer.decode(self.ids[self._start : self._shown])
        text = self.tokenizer.decode(self.ids[self._start :])
        if len(text) > len(known) and (whole or not text.endswith(UNFINISHED)):
            self._start, self._shown = self._shown, len(self.ids)
            piece = text[len(known) :]
            self.text += piece
            self.show(piece)


@dataclass
class Session:
    """A conversation with a loaded model: answers go to standard output, all else through `note`."""

    conversation: Conversation
    model: Any
    note: Callable[[str], None]

    def answer_json(self, prompt: str) -> dict[str, Any]:
        """The answer to `prompt` and its speed. Raises KeyboardInterrupt if it is cut off by one."""
        reply = self.conversation.ask(self.model, prompt, lambda piece: None)
        if reply.interrupted:
            raise KeyboardInterrupt
        for fact in self._cut(reply):
            self.note(f"[{fact}]")
        return {
            "prompt": prompt,
            "answer": reply.text,
            "tokens": reply.tokens,
            "seconds": reply.seconds,
            "tokens_per_second": reply.tokens_per_second,
        }

    def say(self, text: str, *, keep_going: bool = False) -> None:
        """Write the answer to `text` as it comes. With `keep_going`, an interrupt ends the answer alone."""
        reply = self.conversation.ask(self.model, text, _show)
        _show("\n")
        if reply.interrupted and not keep_going:
            raise KeyboardInterrupt
        facts = [f"{reply.tokens} tokens, {reply.tokens_per_second:,.1f} tokens/s", *self._cut(reply)]
        self.note(f"[{'; '.join(facts)}]")

    def run(self) -> None:
        """A turn a line, until the input ends or /quit. From a pipe, raises the first QftError; at a terminal, says it
        and goes on."""
        interactive = sys.stdin.isatty()
        if interactive:
            self.note("/help tells the commands, Ctrl-D leaves")
        for line in _lines(self.note) if interactive else _piped_lines():
            try:
                if not self.turn(line, keep_going=interactive):
                    return
            except QftError as error:
                if not interactive:
                    raise
                self.note(f"error: {error}")

    def turn(self, line: str, *, keep_going: bool = False) -> bool:
        """Do what a command says, or answer. False after /quit."""
        name, _, rest = line.rstrip().partition(" ")
        if name == "/quit":
            return False
        if name in COMMANDS:
            COMMANDS[name](self, rest.strip())
        elif line.startswith("/"):
            raise RecipeError(f"{name}: is none of {', '.join(COMMANDS)} and /quit; a space before it sends it as text")
        elif line.strip():
            self.say(line.strip(), keep_going=keep_going)
        return True

    def reset(self, rest: str) -> None:
        """Forget all turns."""
        self.conversation.messages.clear()
        self.note("[all turns are forgotten]")

    def system(self, text: str) -> None:
        """Change what the system says. Raises DataError if the template takes none."""
        self.conversation.set_system(text)
        self.note(f"[the system says {text!r}, from the first turn on]" if text else "[the system says nothing]")

    def save(self, name: str) -> None:
        """Append the conversation to a file. Raises RecipeError, DataError, or RunError if it cannot be written."""
        path = Path(name).expanduser()
        if path.suffix != ".jsonl":
            raise RecipeError(f"/save {name}: name a .jsonl file")
        line = json.dumps(self.conversation.row(), ensure_ascii=False) + "\n"
        try:
            with path.open("a+b") as stream:
                if stream.tell():
                    stream.seek(-1, 2)
                    line = line if stream.read(1) == b"\n" else "\n" + line
                stream.write(line.encode())
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror}") from error
        self.note(f"[appended to {path}]")

    def help(self, rest: str) -> None:
        self.note(HELP)

    def _cut(self, reply: Reply) -> list[str]:
        """What became of an answer that the model did not end itself."""
        if reply.interrupted:
            return ["interrupted: what was said is kept" if reply.text else "interrupted: the question is dropped"]
        return [] if reply.ended else [f"cut at --max-new-tokens {self.conversation.options.max_new_tokens}"]


COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "/reset": Session.reset,
    "/system": Session.system,
    "/save": Session.save,
    "/help": Session.help,
}


def open_session(
    name: str, adapter: Path | None, options: ChatOptions, prompt: str | None, note: Callable[[str], None]
) -> Session:
    """Load the target `name` to talk to. Raises QftError; whatever is wrong with the target, the options or `prompt` is
    told before the model is loaded."""
    target = parse_target(name, adapter=adapter, data=None)
    plan = target.plan()
    conversation = Conversation(plan.tokenizer, options, plan.shape.max_positions)
    conversation.prompt("Hello" if prompt is None else prompt)
    if not conversation.has_template:
        note(f"[{name} has no chat template: it continues what is written, as plain text]")
    note(f"[loading {name} on {plan.device.name}]")
    model = load_target(target, plan)
    set_seed(options.seed)
    return Session(conversation, model, note)


def _show(piece: str) -> None:
    sys.stdout.write(piece.translate(CONTROLS) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def _lines(note: Callable[[str], None]) -> Iterator[str]:
    """Lines typed at a terminal; Ctrl-C drops the line begun."""
    with suppress(ImportError):  # not on Windows
        importlib.import_module("readline")  # history and editing, for input() to find
    while True:
        if not sys.stdout.isatty():  # input() would write its own among the answers
            sys.stderr.write("> ")
            sys.stderr.flush()
        try:
            line = input("> " if sys.stdout.isatty() else "")
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("\n[/quit or Ctrl-D leaves]")
            continue
        yield line


def _piped_lines() -> Iterator[str]:
    try:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
    except UnicodeDecodeError:
        raise DataError("standard input: not UTF-8 text") from None
