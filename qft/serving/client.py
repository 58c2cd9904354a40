"""A server that speaks OpenAI's API (vLLM, SGLang, llama.cpp, Ollama), asked over HTTP: its models, and answers as they
come."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from qft.errors import RecipeError, ServerError
from qft.serving.reach import KEY, HttpAnswer, clipped, opened, reason_of

ASK_SECONDS = 30
"""That a server may take to say which models it has."""
SILENT_SECONDS = 600
"""That it may say nothing while it answers."""
LONGEST_SILENCE = 86_400
"""Seconds."""
BROKEN = ("abort", "cancelled", "content_filter", "error")
"""Reasons to finish that leave no answer of the model's own."""


@dataclass(frozen=True)
class Written:
    """An answer, as far as it came."""

    text: str
    tokens: int
    """As the server counts them; the pieces that it came in where it does not."""
    ended: bool
    """Whether the model ended it, rather than the limit."""
    seconds_to_first: float
    """Until the first piece that says something; all of them, if none does."""
    seconds: float
    counted: bool = True
    """Whether the server counts its tokens."""
    reasoned: bool = False
    """Whether the server told of a reasoning, which is not part of the text."""


@dataclass(frozen=True)
class Server:
    """One address. All that is asked raises ServerError for what is not answered."""

    url: str
    """Up to what `/chat/completions` follows."""
    silence: float = SILENT_SECONDS
    """Seconds."""

    @classmethod
    def of(cls, url: str, silence: float = SILENT_SECONDS) -> Server:
        """By its address as people give it. Raises RecipeError for what is none, and for a silence that is no time."""
        if not 0 < silence <= LONGEST_SILENCE:  # nor a NaN
            raise RecipeError(f"--timeout {silence:g}: give seconds, {LONGEST_SILENCE:,} at most")
        try:
            parts = urlsplit(url.strip())
            wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
        except ValueError:
            wrong = True
        if wrong or parts.query or parts.fragment or re.search(r"\s", url.strip()):
            raise RecipeError(f"--url {url}: is no address of a server, such as http://127.0.0.1:8000/v1")
        if parts.username is not None:
            raise RecipeError(f"--url: holds a name or password, which is sent to no server; put a key into {KEY}")
        path = re.sub(r"/((chat/)?completions|models)$", "", parts.path.rstrip("/")).rstrip("/")
        return cls(f"{parts.scheme}://{parts.netloc}{path or '/v1'}", silence)

    def models(self) -> list[str]:
        """Names of the models that it has."""
        seconds = ASK_SECONDS if self.silence == SILENT_SECONDS else self.silence
        with opened(self.url, "/models", None, seconds) as answer:
            listed = _json(answer, self.url).get("data")
        names = [item.get("id") for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ServerError(f"{self.url}/models: lists no model; is that the API's address? Most end in /v1")
        return list(dict.fromkeys(map(str, names)))

    def find_model(self, asked: str | None) -> str:
        """The model of that name, or the only one. Raises RecipeError where one of several is to be chosen."""
        try:
            there = self.models()
        except ServerError as error:
            if asked and error.status in (404, 405, 501):  # it answers, and does not tell them
                return asked
            raise
        if asked and not {asked, f"{asked}:latest"} & {*there}:
            raise ServerError(f"{self.url}: has no model {asked} (--model); there: {', '.join(there)}")
        if not asked and len(there) > 1:
            raise RecipeError(f"{self.url}: has several models ({', '.join(there)}); name one by --model")
        return asked or there[0]

    def ask(self, path: str, body: Mapping[str, Any], show: Callable[[str], None] = lambda piece: None) -> Written:
        """The answer to a question for /chat/completions or /completions, each piece of which goes to `show` at once.
        `show` may raise, and then the server is told no more."""
        started = time.perf_counter()
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        with opened(self.url, path, {**body, **stream}, self.silence) as answer:
            return self._written(answer, show, started)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a question, as one JSON object."""
        with opened(self.url, path, body, self.silence) as answer:
            return _json(answer, self.url)

    def _written(self, answer: HttpAnswer, show: Callable[[str], None], started: float) -> Written:
        pieces: list[str] = []
        tokens, finish, first, reasoned = None, None, None, False
        for event in _events(answer, self.url):
            tokens = tokens if (count := _usage(event)) is None else count
            for choice in event.get("choices") or []:
                if choice.get("index"):  # one is asked for
                    continue
                said, thought = _said(choice)
                reasoned, finish = reasoned or thought, choice.get("finish_reason") or finish
                if said:
                    first = first or time.perf_counter()
                    pieces.append(said)
                    show(said)
        if finish in BROKEN:
            raise ServerError(f"{self.url}: ended its answer after {len(pieces)} pieces by {finish}; its log says more")
        if finish is None:  # also where it says that it is done: some drop a request for the next one
            text = f"{self.url}: the answer broke off after {len(pieces)} pieces; its log says more"
            raise ServerError(
                f"{text}, and one that answers a single request at a time may have dropped it (ask fewer)"
            )
        now = time.perf_counter()
        ended, counted = finish not in ("length", "max_tokens"), tokens is not None
        size = len(pieces) if tokens is None else tokens
        return Written("".join(pieces), size, ended, (first or now) - started, now - started, counted, reasoned)


def _events(answer: HttpAnswer, url: str) -> Iterator[dict[str, Any]]:
    """The objects of a stream; of a server that does not stream, its one answer."""
    if not answer.is_stream:
        yield _json(answer, url)
        return
    for line in answer.lines():
        name, _, text = line.decode("utf-8", "replace").partition(":")
        if name == "data" and text.strip() == "[DONE]":
            return
        if not line.endswith(b"\n"):  # cut off in the middle
            return
        if name == "data":
            yield _object(text, url, "a piece of its answer")


def _json(answer: HttpAnswer, url: str) -> dict[str, Any]:
    return _object(answer.read().decode("utf-8", "replace"), url, f"its answer ({answer.kind})")


def _object(text: str, url: str, what: str) -> dict[str, Any]:
    """Raises ServerError for what is no JSON object, and for one that is an error: with status 200, too."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ServerError(f"{url}: {what} is not a JSON object: {clipped(text)!r}; is that the API's address?")
    if found.get("error"):
        raise ServerError(f"{url}: {reason_of(text.encode())}")
    choices = found.get("choices") or []
    if not isinstance(choices, list) or not all(map(_is_choice, choices)):
        raise ServerError(f"{url}: {what} has choices that are none: {clipped(text)!r}")
    return found


def _usage(event: Mapping[str, Any]) -> int | None:
    usage = event.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) and count >= 0 else None


def _is_choice(choice: Any) -> bool:
    """Whether it says something, or nothing, as text or as a list of parts."""
    part = choice.get("delta") or choice.get("message") or {} if isinstance(choice, dict) else None
    return isinstance(part, dict) and isinstance(part.get("content") or "", str | list)


def _said(choice: Mapping[str, Any]) -> tuple[str, bool]:
    """Text of a choice or of a piece of it, and whether it reasons."""
    part = choice.get("delta") or choice.get("message") or choice
    text = part.get("content") if "content" in part else part.get("text")
    if isinstance(text, list):
        texts = [each.get("text") for each in text if isinstance(each, dict)]
        text = "".join(each for each in texts if isinstance(each, str))
    text = text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""  # no half of a surrogate pair
    return text, bool(part.get("reasoning_content") or part.get("reasoning"))
