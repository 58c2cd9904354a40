"""What is worth a look in one row, before it is learnt; and sketches of what rows say, by which they are compared.

Findings are `name place`, by the names of data.audit. A sketch is a MinHash (Broder 1997) of the row's word triples:
the share of equal numbers in two of them estimates the share of triples that both rows have.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qft.data.conversation import Conversation
from qft.data.template import IGNORED, Encoded, special_ids

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff\ufffd]")
SECRETS = {
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{22,}",
    "a GitLab token": r"\bglpat-[\w-]{20,}",
    "an API key": r"\bsk-(?:proj-|ant-|live-)?[\w-]{20,}",
    "a Slack token": r"\bxox[abprs]-[\w-]{10,}",
    "a Google key": r"\bAIza[\w-]{35}",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "a Stripe key": r"\b[rs]k_live_\w{20,}",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "a signed web token": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
}
SECRET = re.compile("|".join(f"({pattern})" for pattern in SECRETS.values()))
BEGINNINGS = ("AKIA", "ASIA", "gh", "glpat-", "sk-", "xox", "AIza", "hf_", "k_live_", "-----BEGIN", "eyJ")
"""One of which is in every secret: to look for them is faster."""
WORDS = re.compile(r"\w+")
SKETCH, FEWEST, LONGEST = 64, 8, 1_000_000
"""Numbers of a sketch, words of the shortest row that has one, and characters of a row that are looked at."""
TRIPLES = 2**15
"""Of words, whose hashes lie in the cache of a core."""
ODD = np.random.default_rng(0).integers(1, 2**63, (2, SKETCH), dtype=np.uint64) | np.uint64(1)
"""Of the hash functions x -> (a x + b) / 2³²."""

Ints = NDArray[np.uint64]


@dataclass
class Look:
    """Looks at rows of one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    ends: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.ends = special_ids(self.tokenizer)

    @cached_property
    def _written(self) -> tuple[str, re.Pattern[str]]:
        """What special tokens begin with as text, and a pattern of them."""
        names = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special} - {""}
        pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")
        return "".join({name[0] for name in names}), pattern

    def _writes_special(self, text: str) -> bool:
        beginnings, pattern = self._written
        return any(each in text for each in beginnings) and bool(pattern.search(text))

    @cached_property
    def puts_bos(self) -> bool:
        """Whether the tokenizer puts a BOS token before every text, so that its model expects one."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a").input_ids[:1] == [bos]

    def findings(self, conversation: Conversation, examples: Sequence[Encoded]) -> list[str]:
        """Of a row and what became of it."""
        found = dict.fromkeys(self._of_turns(conversation))
        found |= dict.fromkeys(name for example in examples for name in self._of_tokens(example))
        return list(found)

    def _of_turns(self, conversation: Conversation) -> Iterator[str]:
        before = None
        for number, message in enumerate(conversation.messages):
            role, content = message["role"], text_of(message)
            if role == before and role in ("user", "assistant"):
                yield f"roles {conversation.turn(number)}"
            if role != "assistant":
                if not content.strip() and isinstance(message["content"], str):
                    yield f"empty_turns {conversation.turn(number)}"
                if self._writes_special(content):
                    yield f"special_tokens {conversation.place(number)}"
            yield from _of_text(content, conversation.place(number))
            before = role
        if conversation.text is not None:
            yield from _of_text(conversation.text, "text")

    def _of_tokens(self, example: Encoded) -> Iterator[str]:
        ids, bos = example.input_ids, self.tokenizer.bos_token_id
        doubled = bos is not None and ids[:2] == [bos, bos]
        if doubled or (self.puts_bos and (ids[:1] != [bos] or ids.count(bos) != 1)):
            yield "bos"
        if example.truncated:
            yield "truncated"
        else:
            last = next((label for label in reversed(example.labels) if label != IGNORED), None)
            if last not in self.ends:
                yield "end_of_turn"


def _of_text(text: str, place: str) -> Iterator[str]:
    if CONTROL.search(text):
        yield f"control_characters {place}"
    if any(each in text for each in BEGINNINGS) and (found := SECRET.search(text)):
        yield f"secrets {place} looks like {[*SECRETS][(found.lastindex or 1) - 1]}"


def said(conversation: Conversation) -> str:
    """All that a row says, roles aside."""
    if conversation.text is not None:
        return conversation.text
    return "\n".join(map(text_of, conversation.messages))


def text_of(message: Mapping[str, Any]) -> str:
    """Of a message that may have images, what is text."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def digest(conversation: Conversation) -> int:
    """The same for rows that say the same, int64."""
    whole = repr((conversation.text, conversation.messages, conversation.tools))
    return int.from_bytes(hashlib.blake2b(whole.encode(), digest_size=8).digest(), "little", signed=True)


def sketches(texts: Sequence[str]) -> list[bytes]:
    """Of each text, uint32 [SKETCH]; empty for one of few words."""
    made = [b""] * len(texts)
    some: dict[int, Ints] = {}
    for number, text in enumerate(texts):
        triples = _triples(text)
        if len(triples):
            some[number] = triples
        if some and (number + 1 == len(texts) or sum(map(len, some.values())) > TRIPLES):
            for each, one in zip(some, _least([*some.values()]), strict=True):
                made[each] = one.tobytes()
            some = {}
    return made


def _triples(text: str) -> Ints:
    """A number for each three words that follow each other; none of a text of few words."""
    text = text[:LONGEST].lower()
    words = WORDS.findall(text)
    if 20 * len(words) < len(text):  # written without spaces
        words = list(text)
    if len(words) < FEWEST:
        return np.zeros(0, dtype=np.uint64)
    hashed = np.array([crc32(word.encode()) for word in words], dtype=np.uint64)
    return (hashed[:-2] * np.uint64(31) + hashed[1:-1]) * np.uint64(1_000_003) + hashed[2:]


def _least(triples: Sequence[Ints]) -> NDArray[np.uint32]:
    """Of each text's triples, the least number that each hash function makes of them, [texts, SKETCH]."""
    starts = np.cumsum([0, *map(len, triples[:-1])])
    together = np.concatenate(triples)
    least = np.stack([np.minimum.reduceat(together * a + b, starts) for a, b in ODD.T], axis=1)
    return (least >> np.uint64(32)).astype("<u4")
