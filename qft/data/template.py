"""Conversation -> token ids and labels, through the model's own chat template.

Which tokens the assistant wrote is told by the template's generation markers where it has them. Where it has none,
the conversation is rendered up to and including each assistant turn: as long as every such text is a prefix of the
whole, the turn is what lies between.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from qft.data.conversation import Conversation, Message
from qft.data.images import count_images, open_image
from qft.data.learnt import IGNORED as IGNORED
from qft.data.learnt import Asked, Turns
from qft.data.learnt import Encoded as Encoded
from qft.data.pictures import Expanded, Pictures
from qft.data.rendering import Example, Renderer, Span, require_all
from qft.data.sandbox import TemplateLimit
from qft.data.sources import BadRow
from qft.errors import DataError

MANY = 32
"""Messages of a row whose length is looked at first."""
LONG = 1_000_000
"""Characters of a text that is tokenized as a whole, whatever comes of it."""


@dataclass
class Encoder:
    """Encodes rows for one tokenizer. Raises BadRow for a row that cannot be learnt from, DataError for a template that
    serves no row."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    on_too_long: str = "stop"
    loss_on: str = "assistant"
    template_file: str | None = None
    """Where the chat template was read, if that is not the tokenizer's own."""
    pictures: Pictures | None = None
    """None: the model reads no images."""
    train_on_eos: str = "turn"
    prompt_loss_weight: float = 0.0
    asked: Asked = field(init=False)
    special_ids: set[int] = field(init=False)
    renderer: Renderer = field(init=False)

    def __post_init__(self) -> None:
        self.asked = Asked(self.loss_on, self.train_on_eos, self.prompt_loss_weight)
        self.special_ids = special_ids(self.tokenizer)
        self.renderer = Renderer(self.tokenizer, self.template_file, self._refuse_long, self._is_cut)

    def __call__(self, conversation: Conversation) -> list[Encoded]:
        """The row's examples: one, unless the template renders turns otherwise once more follow. The last holds all of
        the row."""
        examples = [self._shortened(encoded) for encoded in self._encoded(conversation)]
        # The first token is never predicted, so a label there teaches nothing.
        learnt = [each for each in examples if any(label != IGNORED for label in each.labels[1:])]
        if not learnt:
            cut = f" within the first {self.max_length} tokens" if examples[0].truncated else ""
            raise BadRow(f"no token to learn{cut}")
        return learnt

    def _encoded(self, conversation: Conversation) -> list[Encoded]:
        if conversation.images and not (self.pictures and self.tokenizer.chat_template):
            why = "the model reads no images" if self.pictures is None else "there is no chat template to place images"
            raise BadRow(f"{why}; name their field in data.ignore_fields to leave them out")
        if conversation.text is not None:
            return [self._text(conversation.text)]
        if self.tokenizer.chat_template:
            return self._chat(conversation)
        if conversation.plain is None:
            raise DataError(
                f"{conversation.turn(0)}: the rows have turns, and there is no chat template; give one as "
                "data.chat_template"
            )
        question, answer = conversation.plain
        require_all(conversation, [question + answer], {})
        return [self._question(question, answer)]

    def _shortened(self, encoded: Encoded) -> Encoded:
        """Cut to max_length tokens, if that is the policy. Raises TooLong if not."""
        if len(encoded.input_ids) > self.max_length:
            if self.on_too_long != "truncate":
                raise TooLong(f"{len(encoded.input_ids)} tokens, and data.max_length is {self.max_length}")
            if encoded.seen > self.max_length:
                text = f"{encoded.seen} tokens up to its last image, and data.max_length is {self.max_length}"
                raise BadRow(f"{text}: no image can be cut")
            encoded.truncated = True
            encoded.answer_start = -1
            for each in (encoded.input_ids, encoded.labels, encoded.weights):
                del each[self.max_length :]
        return encoded

    def _refuse_long(self, text: str, messages: int) -> None:
        """Raise TooLong for the whole text of a row that would be one in the end, where it takes long to come there."""
        if self.on_too_long != "truncate" and (messages > MANY or len(text) > LONG):
            count = len(self.tokenizer(self._beginning(text), add_special_tokens=False).input_ids)
            if count > self.max_length:
                raise TooLong(f"{count} tokens, and data.max_length is {self.max_length}")

    def _is_cut(self, text: str) -> bool:
        """Whether a row is cut before the end of its beginning `text`."""
        end = 16 * self.max_length
        if self.on_too_long != "truncate" or len(text) < self.max_length:
            return False
        return len(self.tokenizer(text[:end], add_special_tokens=False).input_ids) > self.max_length

    def _beginning(self, text: str) -> str:
        """The text, or enough of a very long one: millions of tokens would take minutes, and gigabytes, to be cut off.

        Raises TooLong if it is one, unless it is to be cut."""
        if len(text) <= LONG:
            return text
        end, most = 16 * self.max_length, 2 * self.max_length
        while end < len(text):
            if len(self.tokenizer(text[:end], add_special_tokens=False).input_ids) > most:
                if self.on_too_long == "truncate":
                    return text[:end]
                raise TooLong(f"more than {most} tokens, and data.max_length is {self.max_length}")
            end *= 4
        return text

    def _text(self, text: str) -> Encoded:
        ids, _ = self._continued(self._beginning(text))
        return self.asked.of_text(ids, 0, self.tokenizer.eos_token_id)

    def _question(self, question: str, answer: str) -> Encoded:
        """The answer right behind the question, as a text goes on."""
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the model has neither a chat template nor an end token, so a trained model would never stop; give a "
                "template as data.chat_template"
            )
        ids, ends = self._continued(self._beginning(question + answer))
        start = next((i for i, end in enumerate(ends) if end > len(question)), len(ids))
        encoded = self.asked.of_text(ids, 0 if self.loss_on == "all" else start, self.tokenizer.eos_token_id)
        encoded.answer_start = start
        return encoded

    def _continued(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a text with the end token behind it, and the character that each ends at (0: it stands for no
        text)."""
        out = self.tokenizer(text, return_offsets_mapping=True)
        ids, ends = list(out["input_ids"]), [end for _, end in out["offset_mapping"]]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:  # the text has one of its own
            del ids[0], ends[0]
        if eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
            ends.append(0)
        return ids, ends

    def _chat(self, conversation: Conversation) -> list[Encoded]:
        _check_turns(conversation)
        conversation, examples = self.renderer(conversation)
        whole = examples[0]
        encoded = [self._labelled(conversation, each, is_whole=each is whole) for each in reversed(examples)]
        if not any(encoded):
            raise BadRow("no turn is learnt: weight or train of every assistant message says no")
        return [one for one in encoded if one]

    def _labelled(self, conversation: Conversation, example: Example, *, is_whole: bool) -> Encoded | None:
        """Token ids and labels of an example; None if its row says that none of its turns is learnt."""
        self.asked.check(conversation)
        text = self._beginning(example.text)
        ids, turns = self._turns(conversation, example, text)
        if not any(turns.values()):
            raise BadRow("the chat template leaves no token to the assistant")
        turns = {n: [self._without_trailing_space(ids, span) for span in spans] for n, spans in turns.items()}
        self._check_ends(ids, [s for n, spans in turns.items() if example.turns[n][1] <= len(text) for s in spans])
        ends = {ids[end - 1] for spans in turns.values() for _, end in spans} & self.special_ids
        ends |= {self.tokenizer.eos_token_id} - {None}
        encoded = self.asked.of_turns(ids, turns, conversation, ends, whole=is_whole)
        if all(label == IGNORED for label in encoded.labels):
            return None
        return self._with_images(encoded, example, conversation.images) if conversation.images else encoded

    def _with_images(self, encoded: Encoded, example: Example, references: Sequence[str]) -> Encoded:
        """The same once the processor has put in the tokens of the example's images."""
        assert self.pictures is not None
        kept = references[: count_images(example.messages)]
        opened = [open_image(each) for each in kept]
        if not kept:
            return encoded
        if encoded.weights:
            raise BadRow(
                "the tokens of a row with images cannot be weighted: say 0 or 1 of its turns, and leave out "
                "data.prompt_loss_weight"
            )
        expanded = self.pictures.expand(example.text, [image for image, _ in opened])
        made = moved(encoded, example.text, expanded, self.tokenizer)
        if self.loss_on != "all" and [x for x in made.labels if x != IGNORED] != [
            x for x in encoded.labels if x != IGNORED
        ]:
            raise BadRow("the processor writes other tokens where the assistant speaks")
        made.images, made.rendered = list(kept), example.text
        made.image_digest = hashlib.sha256("".join(digest for _, digest in opened).encode()).hexdigest()
        return made

    def _turns(self, conversation: Conversation, example: Example, text: str) -> tuple[list[int], Turns]:
        """Token ids of the text, and the runs of tokens that the assistant wrote, by the number of the message."""
        if self.renderer.has_markers(conversation):
            return self._marked_turns(conversation, example)
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        turns = {number: [_tokens_inside(out["offset_mapping"], span)] for number, span in example.turns.items()}
        return list(out["input_ids"]), {n: [run for run in runs if run[0] < run[1]] for n, runs in turns.items()}

    def _marked_turns(self, conversation: Conversation, example: Example) -> tuple[list[int], Turns]:
        """The same by the template's markers."""
        before = example.messages[: min(example.turns, default=0)]
        earlier = len(self._runs(conversation, before)[1]) if any(m["role"] == "assistant" for m in before) else 0
        ids, runs, starts = self._runs(conversation, example.messages)
        turns: dict[int, list[Span]] = {number: [] for number in example.turns}
        for run in runs[earlier:]:
            turns[next(n for n, (_, end) in example.turns.items() if starts[run[0]] < end)].append(run)
        return ids, turns

    def _runs(self, conversation: Conversation, messages: Sequence[Message]) -> tuple[list[int], list[Span], list[int]]:
        """Token ids, the runs of them that the template marks as generated, and the character that each starts at."""
        out = self.renderer.apply(conversation, messages, tokenize=True)
        mask = out["assistant_masks"]
        edges = [i for i, (a, b) in enumerate(zip([0, *mask], [*mask, 0], strict=True)) if a != b]
        runs = list(zip(edges[::2], edges[1::2], strict=True))
        return list(out["input_ids"]), runs, [start for start, _ in out["offset_mapping"]]

    def _check_ends(self, ids: list[int], turns: Sequence[Span]) -> None:
        if turns and self.train_on_eos != "none" and ids[turns[-1][1] - 1] not in self.special_ids:
            raise BadRow(
                "the chat template ends the assistant's turn without a special token, so a trained model would never "
                "stop; give one that does as data.chat_template"
            )
        for start, end in turns:
            if ids[end - 1] in self.special_ids and ids[end - 1] in ids[start : end - 1]:
                token = self.tokenizer.decode(ids[end - 1])
                raise BadRow(
                    f"the assistant's text contains the end-of-turn token {token}: it would learn to stop there"
                )

    def _without_trailing_space(self, ids: list[int], turn: Span) -> Span:
        """Leave out the line break that some templates write after the end-of-turn token: it is never generated."""
        start, end = turn
        last = end
        while last > start and ids[last - 1] not in self.special_ids:
            if self.tokenizer.decode(ids[last - 1]).strip():
                break
            last -= 1
        return (start, last) if last > start and ids[last - 1] in self.special_ids else turn


def moved(encoded: Encoded, text: str, expanded: Expanded, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """What is learnt of a rendered text, in the text with what stands for its images, which is never learnt."""
    learnt = np.zeros(len(text), dtype=bool)
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for (start, end), label in zip(places, encoded.labels, strict=True):
        learnt[start:end] = label != IGNORED
    out = tokenizer(expanded.text, add_special_tokens=False, return_offsets_mapping=True)
    if list(out["input_ids"]) != expanded.ids:
        raise BadRow("the processor writes other tokens than the tokenizer, so they cannot be told apart")
    starts = np.array([start for start, _ in out["offset_mapping"]])
    ends = np.array([end for _, end in out["offset_mapping"]])
    inside, shift = np.zeros(len(starts), dtype=bool), np.zeros(len(starts), dtype=int)
    for start, end, more in expanded.regions:
        inside |= (ends > start) & (starts < end)
        shift[starts >= end] = more
    labels = [
        number if not within and learnt[at] else IGNORED
        for number, within, at in zip(expanded.ids, inside, np.where(inside, 0, starts - shift), strict=True)
    ]
    seen = int(np.flatnonzero(inside)[-1]) + 1
    answer = places[encoded.answer_start][0] if encoded.answer_start >= 0 else -1
    found = np.flatnonzero(~inside & (starts - shift == answer))
    start = int(found[0]) if len(found) and answer >= 0 else -1
    return Encoded(expanded.ids, labels, answer_start=start if start >= seen else -1, seen=seen)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that stand for no text."""
    added = tokenizer.added_tokens_decoder
    return {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """A conversation up to where the assistant's next turn begins, as training has it; without special tokens to add.

    Raises DataError if the tokenizer has no chat template, or if that refuses the conversation."""
    try:
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
    except TemplateLimit:
        raise
    except Exception as error:  # a template is a program: it can fail with more than jinja's own errors
        raise DataError(f"the chat template refuses the conversation: {error}") from None


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Its token ids. Raises DataError likewise."""
    return list(tokenizer(render_prompt(tokenizer, messages), add_special_tokens=False).input_ids)


class TooLong(BadRow):
    """A row of more than max_length tokens."""


def _check_turns(conversation: Conversation) -> None:
    messages = conversation.messages
    if messages[0]["role"] == "assistant":
        raise BadRow(f"{conversation.turn(0)}: a conversation cannot start with the assistant")
    if messages[-1]["role"] != "assistant":
        raise BadRow("the conversation does not end with the assistant, so its end teaches nothing")


def _tokens_inside(offsets: list[Span], span: Span) -> Span:
    """Indices of the tokens that start within the characters of `span`."""
    starts = [i for i, (a, b) in enumerate(offsets) if span[0] <= a < span[1] and a < b]
    return (starts[0], starts[-1] + 1) if starts else (0, 0)
