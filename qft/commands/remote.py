"""`qft chat --url`: a conversation that a server renders and answers."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qft.commands.chat import Session
from qft.commands.conversation import LONGEST_ANSWER, ChatOptions, Reply, Show, require_text, saved_row
from qft.data.conversation import Message
from qft.errors import DataError
from qft.serving.client import SILENT_SECONDS, Server
from qft.serving.options import EngineOptions


@dataclass
class RemoteConversation:
    """Messages, sent as they are: whatever template the server has renders them."""

    name: str
    """Of the model."""
    options: ChatOptions
    shown: list[str] = field(init=False, default_factory=list)
    messages: list[Message] = field(init=False, default_factory=list)
    system: str | None = field(init=False, default=None)
    longest: int = field(init=False)

    def __post_init__(self) -> None:
        self.longest = self.options.max_new_tokens or LONGEST_ANSWER
        self.set_system(self.options.system)

    def set_system(self, text: str | None) -> None:
        """Change what the system says, for the turns so far too."""
        require_text(f"{text or 'nothing'}")
        self.system = text or None

    def show_image(self, name: str) -> None:
        raise DataError("a server is asked in text alone")

    def ask(self, model: Server, text: str, show: Show) -> Reply:
        """The answer to `text`, each piece of which goes to `show` at once. Both become turns of the conversation,
        unless the answer is interrupted before it begins. Raises ServerError for what is not answered."""
        require_text(text)
        question: Message = {"role": "user", "content": text}
        pieces: list[str] = []

        def shown(piece: str) -> None:
            pieces.append(piece)
            show(piece)

        started, interrupted = time.perf_counter(), False
        tokens, ended = 0, False
        try:
            written = model.ask("/chat/completions", self._body(question), shown)
            tokens, ended = written.tokens, written.ended
        except KeyboardInterrupt:
            interrupted, tokens = True, len(pieces)
        said = "".join(pieces)
        if said or not interrupted:
            self.messages += [question, {"role": "assistant", "content": said}]
        return Reply(said, tokens, time.perf_counter() - started, ended=ended, interrupted=interrupted)

    def row(self) -> dict[str, Any]:
        """The conversation as training reads it. Raises DataError while there is nothing to learn in it."""
        return saved_row({"messages": self._all_messages()}, self.messages)

    def _all_messages(self) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    def _body(self, question: Message) -> dict[str, Any]:
        options = self.options
        drawn = {"top_p": 1.0 if options.top_p is None else options.top_p, "seed": options.seed}
        return {
            "model": self.name,
            "messages": [*self._all_messages(), question],
            "max_tokens": self.longest,
            "temperature": options.temperature,
            **(drawn if options.temperature else {}),
        }


def open_remote(
    engine: EngineOptions, options: ChatOptions, prompt: str | None, note: Callable[[str], None]
) -> Session:
    """A session with a model of the server at engine.url. Raises RecipeError for what makes no sense, ServerError if
    the server is not there or has no such model."""
    assert engine.url is not None
    if prompt is not None:
        require_text(prompt)
    server = Server.of(engine.url, engine.timeout or SILENT_SECONDS)
    conversation = RemoteConversation(server.find_model(engine.model), options)
    note(f"[asking {conversation.name} at {server.url}]")
    return Session(conversation, server, note)
