"""Conversation -> texts, as the model's own chat template renders it, in which every leaf of the row is found.

Templates of models that reason render earlier turns otherwise once more follow (they drop their thoughts): such a row
becomes several examples, each assistant turn in the context in which it will be asked.
"""

import copy
import inspect
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from qft.data.conversation import BESIDE, Conversation, Message
from qft.data.leaves import MARK, marked, missing, structure, written_by_python
from qft.data.sandbox import TemplateLimit, limit_templates
from qft.data.sources import BadRow
from qft.errors import DataError, first_line

limit_templates()
JINJA = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
GENERATION_MARKER = re.compile(r"\{%-?\s*generation\b")
GIVEN = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"} - {"documents"}
"""What every template is given, beside which a row or a recipe may name no argument."""
FEW = 16
"""Turns of the assistant that are rendered without a look at whether they are cut off."""
STRUCTURES = 10_000
"""Of rows, for which it is kept what the template prints of them."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """A rendered text, and the assistant's turns that are learnt in it."""

    text: str
    messages: tuple[Message, ...]
    """Those that were rendered."""
    turns: dict[int, Span]
    """The characters from where a turn is asked for to its end, by the number of its message."""


@dataclass
class Renderer:
    """Renders rows for one tokenizer. Raises BadRow for a row that the template does not say in full, DataError for a
    template that serves no row."""

    tokenizer: PreTrainedTokenizerBase
    template_file: str | None = None
    """Where the chat template was read, if that is not the tokenizer's own."""
    refuse_long: Callable[[str, int], None] = lambda text, messages: None
    """Raises BadRow for a row that is too long, by its whole text: each turn takes one more rendering of it."""
    is_cut: Callable[[str], bool] = lambda text: False
    """Whether what comes behind a text is cut off, so that no turn there need be rendered."""
    _printed: dict[str, dict[str, bool]] = field(init=False, default_factory=dict)
    """Whether the template prints each leaf, by the structure of a row."""

    def __call__(self, conversation: Conversation) -> tuple[Conversation, list[Example]]:
        """The conversation as the template takes it, and its examples: one, unless the template renders turns otherwise
        once more follow. The first holds all of the row."""
        try:
            return conversation, self._rendered(conversation)
        except BadRow as error:
            if not any(isinstance(call.get("arguments"), dict) for call in _calls(conversation.messages)):
                raise
            # Some templates write the arguments of a call as JSON, others want them written.
            try:
                written = _with_written_arguments(conversation)
                return written, self._rendered(written)
            except (BadRow, TypeError):  # or they hold what JSON cannot say
                raise error from None

    def _rendered(self, conversation: Conversation) -> list[Example]:
        self._check_arguments(conversation)
        whole = self.apply(conversation, conversation.messages)
        self.refuse_long(whole, len(conversation.messages))
        answers = self._answers(conversation)
        examples = self._examples(conversation, whole, answers)
        texts = [example.text for example in examples]
        if place := written_by_python(conversation, texts):
            raise BadRow(f"{place}: the chat template writes its arguments as Python does, and not as JSON")
        require_all(conversation, texts, self._told_by_marks(conversation, answers))
        return examples

    def _answers(self, conversation: Conversation) -> list[int]:
        """Numbers of the assistant's messages, of a long row those that begin before it is cut, and at least one."""
        messages = conversation.messages
        found = [number for number, message in enumerate(messages) if message["role"] == "assistant"]

        def is_behind(number: int) -> bool:
            return self.is_cut(self.apply(conversation, messages[:number]))

        if len(found) <= FEW:
            return found
        end = FEW
        while end < len(found) and not is_behind(found[end]):
            end *= 2
        return found[: bisect_left(found, True, lo=FEW // 2, hi=min(end, len(found)), key=is_behind)]

    def _check_arguments(self, conversation: Conversation) -> None:
        """A row's arguments of the template must be some that it reads."""
        template = self._template(conversation)
        for name in conversation.template_kwargs:
            if not reads(template, name):
                raise BadRow(f"chat_template_kwargs.{name}: the chat template reads nothing of that name")

    def _told_by_marks(self, conversation: Conversation, answers: Sequence[int]) -> dict[str, bool]:
        key = structure(conversation)
        if len(self._printed) > STRUCTURES:
            self._printed.clear()
        if key not in self._printed:
            with_marks, marks = marked(conversation)
            try:
                whole = self.apply(with_marks, with_marks.messages)
                texts = [example.text for example in self._examples(with_marks, whole, answers)]
            except BadRow:  # a template may want real values; then leaves are looked for as they stand
                marks = {}
            said = {mark for text in texts for mark in MARK.findall(text)} if marks else set()
            self._printed[key] = {name: mark in said for name, mark in marks.items()}
        return self._printed[key]

    def _examples(self, conversation: Conversation, whole: str, answers: Sequence[int]) -> list[Example]:
        """The `whole` conversation, then whatever of it is rendered otherwise while less of it was said; with the turns
        `answers`."""
        messages, has_markers = conversation.messages, self.has_markers(conversation)
        text, end = whole, len(messages)
        examples: list[Example] = []
        turns: dict[int, Span] = {}
        for number in reversed(answers):
            after = whole if number + 1 == len(messages) else self.apply(conversation, messages[: number + 1])
            before = self.apply(conversation, messages[:number], add_generation_prompt=not has_markers)
            if not after.startswith(before) and not has_markers:
                raise BadRow(self._unlike(conversation, number, after))
            if not text.startswith(after):
                examples += [Example(text, messages[:end], turns)] if turns else []
                text, end, turns = after, number + 1, {}
            turns = {number: (len(before), len(after)), **turns}
        return [*examples, Example(text, messages[:end], turns)]

    def has_markers(self, conversation: Conversation) -> bool:
        """Whether the template tells by {% generation %} what the assistant wrote."""
        return bool(GENERATION_MARKER.search(self._template(conversation)))

    def _template(self, conversation: Conversation) -> str:
        try:
            return str(self.tokenizer.get_chat_template(tools=conversation.tools))
        except ValueError as error:  # there are several, and none is the default
            raise DataError(f"{first_line(error)} Give one as data.chat_template") from None

    def _unlike(self, conversation: Conversation, number: int, after: str) -> str:
        """Why a turn does not begin where it is asked for."""
        place, so = conversation.turn(number), "so its tokens cannot be told apart"
        remedy = "give a template with {% generation %} markers as data.chat_template, or split the conversation"
        if after.startswith(self.apply(conversation, conversation.messages[:number])):
            return (
                f"{place}: the chat template asks for it otherwise (add_generation_prompt) than it writes it, {so}; "
                f"set data.template_kwargs, if it has a switch, or {remedy}"
            )
        return f"{place}: the chat template renders the turns before it differently once it follows, {so}; {remedy}"

    def apply(self, conversation: Conversation, messages: Sequence[Message], **options: Any) -> Any:
        """The rendered text; with tokenize=True token ids, the assistant's mask and where in the text tokens stand."""
        if not messages:
            return ""
        if options.setdefault("tokenize", False):
            options |= {"return_dict": True, "return_assistant_tokens_mask": True}
            options["tokenizer_kwargs"] = {"return_offsets_mapping": True}
        arguments = {**conversation.template_kwargs, **options}
        try:
            return self.tokenizer.apply_chat_template(list(messages), tools=conversation.tools, **arguments)
        except TemplateSyntaxError as error:
            where = self.template_file or "the model's chat template"
            raise DataError(f"{where}:{error.lineno}: not a Jinja template: {error.message}") from None
        except TemplateLimit as error:  # the next row would take as long
            raise TemplateLimit(f"{self.template_file}: {error}" if self.template_file else str(error)) from None
        except RecursionError:
            raise BadRow("nested too deeply for the chat template") from None
        except Exception as error:  # a template is a program: it can fail with more than jinja's own errors
            raise BadRow(f"the chat template refuses the conversation: {error}") from None


def reads(template: str, name: str) -> bool:
    """Whether a chat template reads `name`, an argument of its own."""
    return name not in GIVEN and name in _read_names(template)


@lru_cache(maxsize=8)
def _read_names(template: str) -> frozenset[str]:
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)  # a tag that transformers adds to Jinja
    try:
        return frozenset(find_undeclared_variables(JINJA.parse(plain)))
    except TemplateSyntaxError as error:
        raise DataError(f"the chat template:{error.lineno}: not a Jinja template: {error.message}") from None
    except RecursionError:
        raise DataError("the chat template: nested too deeply") from None


def require_all(conversation: Conversation, texts: list[str], printed: Mapping[str, bool]) -> None:
    """Refuse a row of which a leaf is in none of the texts."""
    if place := missing(conversation, texts, printed):
        remedy = "give a template that does as data.chat_template"
        if place in conversation.places and place not in BESIDE:
            role = conversation.messages[conversation.places.index(place)]["role"]
            what = f"what the role {role} says there"
        else:
            names = re.sub(r"\.\d+", "", place).split(".")
            remedy += f", or leave it out by data.ignore_fields: [{'.'.join(names[: 1 if names[0] in BESIDE else 2])}]"
            what = "it"
        raise BadRow(f"{place}: the chat template does not print {what}, so the model would never see it: {remedy}")


def _calls(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    """What of each call holds its arguments."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            yield call["function"] if isinstance(call.get("function"), dict) else call


def _with_written_arguments(conversation: Conversation) -> Conversation:
    """The same with the arguments of each call as JSON text."""
    messages = copy.deepcopy(conversation.messages)
    for call in _calls(messages):
        if "arguments" in call:
            call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
    return replace(conversation, messages=messages)
