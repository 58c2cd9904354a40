"""`qft chat`: a conversation with one target, in the terminal, from a pipe, or one answer."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import set_seed

from qft.commands.conversation import ChatOptions, Conversation, Reply, Show
from qft.data.conversation import Message
from qft.errors import DataError, QftError, RecipeError, RunError
from qft.model.target import load_target, parse_target
from qft.plan.limits import require_special_tokens
from qft.views.words import CONTROLS

HELP = """\
/reset        forget all turns; what the system says stays
/system TEXT  what the system says; without TEXT, nothing
/image FILE   ask the next question with an image
/save FILE    append the conversation to FILE.jsonl, as a row that training reads
/quit         leave, as does Ctrl-D; Ctrl-C ends an answer and keeps what was said
A line that starts with a space is never a command."""


class Talk(Protocol):
    """A conversation, by whomever it is answered; what its methods do and raise, Conversation's tell."""

    longest: int
    messages: list[Message]
    shown: list[str]

    def set_system(self, text: str | None) -> None: ...

    def show_image(self, name: str) -> None: ...

    def ask(self, model: Any, text: str, show: Show) -> Reply: ...

    def row(self) -> dict[str, Any]: ...


@dataclass
class Session:
    """A conversation with a loaded model: answers go to standard output, all else through `note`."""

    conversation: Talk
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
        self.conversation.shown.clear()
        self.note("[all turns are forgotten]")

    def system(self, text: str) -> None:
        """Change what the system says. Raises DataError if the template takes none."""
        self.conversation.set_system(text)
        self.note(f"[the system says {text!r}, from the first turn on]" if text else "[the system says nothing]")

    def image(self, name: str) -> None:
        """Ask the next question with an image. Raises DataError if it cannot be read."""
        self.conversation.show_image(name)
        self.note(f"[{name} goes with the next question]")

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
        return [] if reply.ended else [f"cut at --max-new-tokens {self.conversation.longest}"]


COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "/reset": Session.reset,
    "/system": Session.system,
    "/image": Session.image,
    "/save": Session.save,
    "/help": Session.help,
}


def open_session(
    name: str,
    adapter: Path | None,
    options: ChatOptions,
    prompt: str | None,
    note: Callable[[str], None],
    images: Sequence[Path] = (),
) -> Session:
    """Load the target `name` to talk to. Raises QftError; whatever is wrong with the target, the options or `prompt` is
    told before the model is loaded."""
    target = parse_target(name, adapter=adapter, data=None)
    if target.unverified:
        note(f"[{target.unverified}]")
    plan = target.plan()
    require_special_tokens(plan.tokenizer, plan.shape.embeddings, generates=True)
    shape, pictures = plan.shape, None if target.in_llamacpp else plan.pictures
    conversation = Conversation(plan.tokenizer, options, shape.max_positions, shape.embeddings, pictures)
    for path in images:
        conversation.show_image(str(path))
    conversation.prompt("Hello" if prompt is None else prompt)
    if not conversation.has_template:
        note(f"[{name} has no chat template: it continues what is written, as plain text]")
    if plan.held_in_part:
        note(f"[{plan.held_in_part}]")
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
