"""Which tokens of an encoded row are learnt, and what each counts in the loss."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qft.data.conversation import Conversation
from qft.data.rendering import Span
from qft.data.sources import BadRow

IGNORED = -100
"""Label of a token that is not learnt."""

Turns = Mapping[int, Sequence[Span]]
"""Runs of tokens that the assistant wrote, by the number of the message."""


@dataclass
class Encoded:
    """One example. `labels` equal `input_ids` where a token is learnt, IGNORED elsewhere; both int32 [tokens]."""

    input_ids: list[int]
    labels: list[int]
    answer_start: int = -1
    """Index of the first token of the last turn that is learnt; -1 if that turn is cut, and for plain text."""
    truncated: bool = False
    weights: list[float] = field(default_factory=list)
    """What each token counts in the loss of a training [tokens]; empty: 1 where it is learnt, and else nothing."""
    images: list[str] = field(default_factory=list)
    """References of its images, whose tokens are among input_ids."""
    rendered: str = ""
    """The text before those tokens were put in."""
    image_digest: str = ""
    seen: int = 0
    """Tokens up to the end of the last image's."""


@dataclass(frozen=True)
class Asked:
    """What is learnt, as the fields of `data` have it."""

    loss_on: str = "assistant"
    train_on_eos: str = "turn"
    prompt_loss_weight: float = 0.0

    def check(self, conversation: Conversation) -> None:
        """What rows say of single turns must be possible. Raises BadRow."""
        last = len(conversation.messages) - 1
        for number, weight in enumerate(conversation.weights):
            text = None
            if conversation.messages[number]["role"] == "assistant":
                if weight and self.loss_on == "last_assistant" and number < last:
                    text = "only the last turn is learnt, unless data.loss_on is assistant"
            elif weight is not None and weight != 1 and self.loss_on == "all":
                text = "cannot be left out, nor count less, while data.loss_on is all"
            elif weight and self.loss_on != "all":
                text = "only the assistant's turns are learnt, unless data.loss_on is all"
            if text:
                raise BadRow(f"{conversation.turn(number)}: {text}")

    def of_text(self, ids: list[int], start: int, end: int | None) -> Encoded:
        """A text that is learnt from the token `start` on; `end` is the token that ends texts."""
        encoded = Encoded(ids, [*[IGNORED] * start, *ids[start:]])
        self._weigh(encoded, {end}, len(ids) - 1, [1.0] * len(ids))
        return encoded

    def of_turns(
        self, ids: list[int], turns: Turns, conversation: Conversation, ends: set[int], *, whole: bool
    ) -> Encoded:
        """An example with these turns, of the `whole` row or of its beginning; `ends` are tokens that end turns."""
        said = {n: weight for n, weight in enumerate(conversation.weights) if weight is not None}
        answers = [n for n, each in enumerate(conversation.messages) if each["role"] == "assistant" and said.get(n, 1)]
        last = max(answers, default=-1)
        factors = [1.0] * len(ids)
        for number in turns.keys() & said.keys():
            for start, end in turns[number]:
                factors[start:end] = [said[number]] * (end - start)
        learnt = [n for n in turns if n in answers and (self.loss_on != "last_assistant" or n == last)]
        everything = self.loss_on == "all" and whole
        labels = [token if everything and factor else IGNORED for token, factor in zip(ids, factors, strict=True)]
        for start, end in (span for number in learnt for span in turns[number]):
            labels[start:end] = ids[start:end]
        encoded = Encoded(ids, labels, max((start for n in learnt for start, _ in turns[n]), default=-1))
        self._weigh(encoded, ends, max((end - 1 for _, end in turns.get(last, ())), default=-1), factors)
        return encoded

    def _weigh(self, encoded: Encoded, ends: Collection[int | None], last: int, factors: Sequence[float]) -> None:
        """Have tokens that end turns learnt as train_on_eos says, of which the last is at `last`, and say what each
        token counts; by the `factors` of what rows say."""
        ids, labels, never = encoded.input_ids, encoded.labels, set[int]()
        if self.train_on_eos != "turn":
            for place in (place for place, token in enumerate(ids) if token in ends):
                learns = self.train_on_eos == "all" or (self.train_on_eos == "last" and place == last)
                labels[place] = ids[place] if learns and factors[place] else IGNORED
                never |= set() if learns else {place}
        if self.prompt_loss_weight or not {*factors} <= {0.0, 1.0}:
            encoded.weights = [*self._weights(labels, factors, never)]

    def _weights(self, labels: list[int], factors: Sequence[float], never: set[int]) -> Iterator[float]:
        for place, (label, factor) in enumerate(zip(labels, factors, strict=True)):
            prompt = self.prompt_loss_weight if factor and place not in never else 0.0
            yield factor if label != IGNORED else prompt
