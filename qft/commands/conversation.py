"""A conversation with a loaded model: its turns, rendered and answered."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from qft.data.batch import pictured_inputs
from qft.data.conversation import Conversation as Row
from qft.data.conversation import Message
from qft.data.formats import FORMATS
from qft.data.images import is_image, open_image
from qft.data.pictures import Pictures
from qft.data.sources import BadRow
from qft.data.template import Encoder, encode_prompt, render_prompt
from qft.errors import DataError, RecipeError
from qft.measure.scores import generation_config
from qft.memory.guard import memory_guard
from qft.plan.limits import unknown_token

Show = Callable[[str], None]
"""Takes a piece of an answer as soon as it is known."""

LONGEST_ANSWER = 512
"""Tokens, where nothing else was asked for."""

UNFINISHED = "\ufffd"
"""What a decoder writes for the bytes of a character that is not whole yet."""


@dataclass(frozen=True)
class ChatOptions:
    """What the command line says beside the target. Raises RecipeError for what means nothing."""

    system: str | None = None
    max_new_tokens: int | None = None
    """None: LONGEST_ANSWER, or what the model has room for."""
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

    `max_positions` is the longest sequence, in tokens, that the model was built for; None if it does not say.
    `embeddings` is how many tokens it knows; None if that is not known."""

    tokenizer: PreTrainedTokenizerBase
    options: ChatOptions
    max_positions: int | None = None
    embeddings: int | None = None
    pictures: Pictures | None = None
    """What reads images; None: the model reads none."""
    shown: list[str] = field(init=False, default_factory=list)
    """Images that the next question is asked with."""
    messages: list[Message] = field(init=False, default_factory=list)
    """The turns so far, without what the system says."""
    system: str | None = field(init=False, default=None)
    longest: int = field(init=False)
    """Tokens that the answer to the last prompt may have."""

    def __post_init__(self) -> None:
        self.longest = self.options.max_new_tokens or LONGEST_ANSWER
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

    def show_image(self, name: str) -> None:
        """Ask the next question with the image in that file. Raises DataError if that cannot be."""
        if self.pictures is None or not self.has_template:
            raise DataError("the model reads no images")
        path = str(Path(name).expanduser().absolute())
        try:
            open_image(path)
        except BadRow as error:
            raise DataError(str(error)) from None
        self.shown.append(path)

    def prompt(self, text: str) -> list[int]:
        """Token ids of all turns and then `text`, up to where the answer begins.

        Raises DataError for what cannot be rendered, RecipeError if the model has no room for it and the answer."""
        require_text(text)
        ids = self._render(text)
        if self.embeddings and (unknown := unknown_token(ids, self.tokenizer, self.embeddings)):
            raise DataError(unknown)
        room, wanted = self.max_positions, self.options.max_new_tokens
        self.longest = wanted or min(LONGEST_ANSWER, max(1, (room or sys.maxsize) - len(ids)))
        if room is not None and len(ids) + self.longest > room:
            remedies = ["/reset starts anew (no turn is dropped by itself)"] * bool(self.messages)
            remedies += ["lower --max-new-tokens" if wanted else "say it in fewer words"]
            more = f"--max-new-tokens {wanted} more" if wanted else "an answer one more at the least"
            raise RecipeError(
                f"the conversation takes {len(ids)} tokens and {more}, and the model was built for {room}; "
                + ", or ".join(remedies)
            )
        return ids

    def ask(self, model: Any, text: str, show: Show) -> Reply:
        """The answer to `text`, each piece of which goes to `show` at once. Both become turns of the conversation,
        unless the answer is interrupted before it begins. Raises what `prompt` does, or OutOfMemoryError."""
        ids = self.prompt(text)
        question = self._question(text)
        settings = self.generation_config(model)
        writer = _Writer(self.tokenizer, settings.eos_token_id, show)
        row = self._with_images([*self._all_messages(), question]) or {"input_ids": ids}
        inputs = pictured_inputs([row], 0, self.pictures, device=next(model.parameters()).device)
        started, interrupted = time.perf_counter(), False
        try:
            with memory_guard("answering", self._smaller(model)), torch.inference_mode():
                model.generate(**inputs, generation_config=settings, streamer=writer)
        except KeyboardInterrupt:
            interrupted = True
            writer.end()
        seconds = time.perf_counter() - started
        if writer.text or not interrupted:
            self.messages += [question, {"role": "assistant", "content": writer.text}]
            self.shown.clear()
        return Reply(writer.text, len(writer.ids), seconds, ended=writer.ended, interrupted=interrupted)

    def _smaller(self, model: Any) -> Iterator[str]:
        if not getattr(model, "is_loaded_in_4bit", False):
            yield "hold the base in 4 bits (TARGET@nf4)"
        if self.messages:
            yield "start anew with /reset"
        yield f"lower --max-new-tokens ({self.longest})"

    def generation_config(self, model: Any) -> GenerationConfig:
        """Stops as those of `qft eval`; greedy too, or drawn as the options say."""
        settings = generation_config(model, self.tokenizer, self.longest, self._rendered_row())
        if self.options.temperature:
            settings.do_sample, settings.temperature = True, self.options.temperature
            settings.top_p = 1.0 if self.options.top_p is None else self.options.top_p
            settings.top_k = 0  # else 50, or the model's own: nothing that was asked for
        return settings

    def row(self) -> dict[str, Any]:
        """The conversation as training reads it. Raises DataError while there is nothing to learn in it."""
        name = "messages" if self.has_template else "text"
        row: dict[str, Any] = {name: self._all_messages() if self.has_template else self._text("").rstrip("\n")}
        return saved_row(row, self.messages)

    def _render(self, text: str) -> list[int]:
        require_text(f"{self.system}{text}")
        if self.has_template:
            messages = [*self._all_messages(), self._question(text)]
            row = self._with_images(messages)
            return row["input_ids"] if row else encode_prompt(self.tokenizer, messages)
        ids = list(self.tokenizer(self._text(text)).input_ids)
        return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def _question(self, text: str) -> Message:
        images = [{"type": "image", "image": path} for path in self.shown]
        return {"role": "user", "content": [*images, {"type": "text", "text": text}] if images else text}

    def _with_images(self, messages: list[Message]) -> dict[str, Any] | None:
        """The messages as an encoded row; None: they hold no images."""
        contents = (message["content"] for message in messages if isinstance(message["content"], list))
        images = [part["image"] for content in contents for part in content if is_image(part)]
        if not images or self.pictures is None:
            return None
        text = render_prompt(self.tokenizer, messages)
        try:
            expanded = self.pictures.expand(text, [open_image(path)[0] for path in images])
        except BadRow as error:
            raise DataError(str(error)) from None
        return {"input_ids": expanded.ids, "images": images, "rendered": text}

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
            return Encoder(self.tokenizer, max_length=sys.maxsize)(Row(turns))[0].labels
        except BadRow:
            return []  # no row can be learnt through such a template, so no model has learnt its end of turn


def require_text(text: str) -> None:
    """Raises RecipeError for nothing, DataError for what is no text."""
    if not text.strip():
        raise RecipeError("there is nothing to answer: the prompt is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("what was typed is not UTF-8 text") from None


def saved_row(row: dict[str, Any], messages: Sequence[Message]) -> dict[str, Any]:
    """The row of these messages. Raises DataError while there is nothing to learn in it."""
    try:
        if not messages:
            raise BadRow("nothing was said yet")
        FORMATS[next(iter(row))](row)
    except BadRow as error:
        raise DataError(f"/save: {error}") from None
    return row


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
