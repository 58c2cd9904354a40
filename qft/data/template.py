"""Conversation -> token ids and labels, through the model's own chat template.

Which tokens the assistant wrote is told by the template's generation markers where it has them. Where it has none,
the conversation is rendered up to and including each assistant turn: as long as every such text is a prefix of the
whole, the turn is what lies between. A template for which that does not hold is refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from qft.data.formats import Conversation, Message
from qft.data.sources import BadRow
from qft.errors import DataError

IGNORED = -100
"""Label of a token that is not learnt."""

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\b")

Span = tuple[int, int]


@dataclass
class Encoded:
    """One row. `labels` equal `input_ids` where a token is learnt, IGNORED elsewhere; both int32 [tokens]."""

    input_ids: list[int]
    labels: list[int]
    answer_start: int = -1
    """Index of the last assistant turn's first token; -1 if that turn is cut, and for plain text."""
    truncated: bool = False


@dataclass
class Encoder:
    """Encodes rows for one tokenizer. Raises BadRow for a row that cannot be learnt from."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    on_too_long: str = "stop"
    loss_on: str = "assistant"
    special_ids: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.special_ids = special_ids(self.tokenizer)

    def __call__(self, conversation: Conversation) -> Encoded:
        encoded = self._text(conversation.text) if conversation.text is not None else self._chat(conversation)
        if len(encoded.input_ids) > self.max_length:
            self._shorten(encoded)
        # The first token is never predicted, so a label there teaches nothing.
        if all(label == IGNORED for label in encoded.labels[1:]):
            cut = f" within the first {self.max_length} tokens" if encoded.truncated else ""
            raise BadRow(f"no token to learn{cut}")
        return encoded

    def _shorten(self, encoded: Encoded) -> None:
        if self.on_too_long != "truncate":
            raise TooLong(f"{len(encoded.input_ids)} tokens, and data.max_length is {self.max_length}")
        encoded.truncated = True
        encoded.answer_start = -1
        del encoded.input_ids[self.max_length :], encoded.labels[self.max_length :]

    def _text(self, text: str) -> Encoded:
        ids = list(self.tokenizer(text).input_ids)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:  # the text has one of its own
            del ids[0]
        if eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        return Encoded(ids, list(ids))

    def _chat(self, conversation: Conversation) -> Encoded:
        _check_turns(conversation)
        try:
            template = self.tokenizer.get_chat_template(tools=conversation.tools)
        except ValueError:
            raise DataError("the model has no chat template; give one as data.chat_template") from None
        marked = GENERATION_MARKER.search(template)
        ids, turns = self._by_markers(conversation) if marked else self._by_prefixes(conversation)
        if not turns:
            raise BadRow("the chat template leaves no token to the assistant")
        turns = [self._without_trailing_space(ids, turn) for turn in turns]
        if ids[turns[-1][1] - 1] not in self.special_ids:
            raise BadRow(
                "the chat template ends the assistant's turn without a special token, so a trained model would never "
                "stop; give one that does as data.chat_template"
            )
        for start, end in turns:
            if ids[end - 1] in ids[start : end - 1]:
                token = self.tokenizer.decode(ids[end - 1])
                raise BadRow(
                    f"the assistant's text contains the end-of-turn token {token}: it would learn to stop there"
                )
        labels = list(ids) if self.loss_on == "all" else [IGNORED] * len(ids)
        for start, end in turns:
            labels[start:end] = ids[start:end]
        return Encoded(ids, labels, answer_start=turns[-1][0])

    def _by_markers(self, conversation: Conversation) -> tuple[list[int], list[Span]]:
        """Token ids, and the runs of tokens that the template marks as generated."""
        out = self._apply(conversation.messages, conversation.tools, tokenize=True)
        ids, mask = list(out["input_ids"]), list(out["assistant_masks"])
        edges = [i for i, (a, b) in enumerate(zip([0, *mask], [*mask, 0], strict=True)) if a != b]
        return ids, list(zip(edges[::2], edges[1::2], strict=True))

    def _by_prefixes(self, conversation: Conversation) -> tuple[list[int], list[Span]]:
        """Token ids, and the tokens of each assistant turn by the text before and after it."""
        messages, tools = conversation.messages, conversation.tools
        whole = self._apply(messages, tools)
        spans: list[Span] = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._apply(messages[:i], tools, add_generation_prompt=True)
                after = self._apply(messages[: i + 1], tools)
                if not (whole.startswith(after) and after.startswith(before)):
                    raise BadRow(
                        f"messages.{i}: the chat template renders the turns so far differently once more follow, so "
                        "the assistant's tokens cannot be told apart; give a template with {% generation %} markers as "
                        "data.chat_template, or split the conversation"
                    )
                spans.append((len(before), len(after)))
        encoding = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoding["offset_mapping"]
        turns = [_tokens_inside(offsets, span) for span in spans]
        return list(encoding["input_ids"]), [turn for turn in turns if turn[0] < turn[1]]

    def _without_trailing_space(self, ids: list[int], turn: Span) -> Span:
        """Leave out the line break that some templates write after the end-of-turn token: it is never generated."""
        start, end = turn
        last = end
        while last > start and ids[last - 1] not in self.special_ids:
            if self.tokenizer.decode(ids[last - 1]).strip():
                break
            last -= 1
        return (start, last) if last > start and ids[last - 1] in self.special_ids else turn

    def _apply(self, messages: tuple[Message, ...], tools: list[Any] | None, **options: Any) -> Any:
        """The rendered text, or with tokenize=True the token ids and the assistant mask."""
        if options.setdefault("tokenize", False):
            options |= {"return_dict": True, "return_assistant_tokens_mask": True}
        try:
            return self.tokenizer.apply_chat_template(list(messages), tools=tools, **options)
        except Exception as error:  # a template is a program: it can fail with more than jinja's own errors
            raise BadRow(f"the chat template refuses the conversation: {error}") from None


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that stand for no text."""
    added = tokenizer.added_tokens_decoder
    return {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the assistant's next turn begins, as training has them.

    Raises DataError if the tokenizer has no chat template, or if that refuses the conversation."""
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program: it can fail with more than jinja's own errors
        raise DataError(f"the chat template refuses the conversation: {error}") from None
    return list(tokenizer(text, add_special_tokens=False).input_ids)


class TooLong(BadRow):
    """A row of more than max_length tokens."""


def _check_turns(conversation: Conversation) -> None:
    messages = conversation.messages
    if messages[0]["role"] == "assistant":
        raise BadRow("messages.0: a conversation cannot start with the assistant")
    if messages[-1]["role"] != "assistant":
        raise BadRow("the conversation does not end with the assistant, so its end teaches nothing")


def _tokens_inside(offsets: list[Span], span: Span) -> Span:
    """Indices of the tokens that start within the characters of `span`."""
    starts = [i for i, (a, b) in enumerate(offsets) if span[0] <= a < span[1] and a < b]
    return (starts[0], starts[-1] + 1) if starts else (0, 0)
