"""A server that speaks OpenAI's API (vLLM, SGLang, llama.cpp, Ollama), asked over HTTP: its models, and answers as they
come."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from qft.errors import RecipeError, ServerError, first_line

KEY = "QFT_API_KEY"
"""Variable of the environment whose value is sent to a server that wants a key. No other program's is."""
ASK_SECONDS = 30
"""That a server may take to say which models it has."""
SILENT_SECONDS = 600
"""That it may say nothing while it answers."""
LONGEST = 2**24
"""Bytes of an answer, or of one piece of it, that are read."""
SHOWN = 300
"""Characters of what a server says that a message shows."""
LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|::1")
REMEDIES = {
    401: f"it wants a key: put it into {KEY}",
    403: f"it wants another key: put it into {KEY}",
    404: "is that the API's address? Most end in /v1",
    429: "it has too much to do: ask fewer at once",
}
"""By HTTP status."""


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
    reasoned: bool = False
    """Whether the server told of a reasoning, which is not part of the text."""


class _NoRedirect(HTTPRedirectHandler):
    """A question that is sent on arrives as another one."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


@dataclass(frozen=True)
class Server:
    """One address. All that is asked raises ServerError for what is not answered."""

    url: str
    """Up to what `/chat/completions` follows."""
    silence: float = SILENT_SECONDS
    """Seconds."""

    @classmethod
    def of(cls, url: str, silence: float = SILENT_SECONDS) -> Server:
        """By its address as people give it. Raises RecipeError for what is none."""
        try:
            parts = urlsplit(url.strip())
            wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
        except ValueError:
            wrong = True
        if wrong or parts.query or parts.fragment or re.search(r"\s", url.strip()):
            raise RecipeError(f"--url {url}: is no address of a server, such as http://127.0.0.1:8000/v1")
        if parts.username is not None:
            raise RecipeError(f"--url: holds a name or password, which is sent to no server; put a key into {KEY}")
        path = re.sub(r"/(chat/)?completions$", "", parts.path.rstrip("/")).rstrip("/")
        return cls(f"{parts.scheme}://{parts.netloc}{path or '/v1'}", silence)

    def models(self) -> list[str]:
        """Names of the models that it has."""
        with self._opened("/models", None, ASK_SECONDS) as answer:
            listed = _json(answer, self.url).get("data")
        names = [item.get("id") for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ServerError(f"{self.url}/models: lists no model; is that the API's address? Most end in /v1")
        return [str(name) for name in names]

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
        with self._opened(path, {**body, **stream}, self.silence) as answer:
            return self._written(answer, show, started)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a question, as one JSON object."""
        with self._opened(path, body, self.silence) as answer:
            return _json(answer, self.url)

    def _opened(self, path: str, body: Mapping[str, Any] | None, seconds: float) -> _Answer:
        headers = {"Content-Type": "application/json", "User-Agent": "qft"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = Request(self.url + path, data, headers)  # noqa: S310  # http or https, as `of` has it
            return _Answer(_opener(self.url).open(request, timeout=seconds), self.url)
        except HTTPError as error:
            raise self._refusal(path, error) from error
        except (OSError, HTTPException, ValueError) as error:
            raise _unreachable(self.url, error, seconds) from error

    def _refusal(self, path: str, error: HTTPError) -> ServerError:
        with error:
            try:
                said = _reason(error.read(LONGEST))
            except (OSError, HTTPException):
                said = ""
        remedy = REMEDIES.get(error.code, "its log says more" if error.code >= 500 else "")
        if 300 <= error.code < 400:
            remedy = f"it sends on to {_clipped(error.headers.get('Location', 'nowhere'))}; give that address"
        told = "; ".join(filter(None, (said, remedy)))
        return ServerError(f"{self.url}{path}: answered {error.code} {error.reason}: {told}".rstrip(": "), error.code)

    def _written(self, answer: _Answer, show: Callable[[str], None], started: float) -> Written:
        pieces: list[str] = []
        tokens, finish, first, reasoned = None, None, None, False
        for event in _events(answer, self.url):
            tokens = _usage(event) or tokens
            for choice in event.get("choices") or []:
                said, thought = _said(choice)
                reasoned, finish = reasoned or thought, choice.get("finish_reason") or finish
                if said:
                    first = first or time.perf_counter()
                    pieces.append(said)
                    show(said)
        if finish is None:  # also where it says that it is done: some drop a request for the next one
            text = f"{self.url}: the answer broke off after {len(pieces)} pieces; its log says more"
            raise ServerError(
                f"{text}, and one that answers a single request at a time may have dropped it (ask fewer)"
            )
        now = time.perf_counter()
        ended = finish not in ("length", "max_tokens")
        return Written("".join(pieces), tokens or len(pieces), ended, (first or now) - started, now - started, reasoned)


class _Answer:
    """What a server answers, closed once it is left; what breaks it off is a ServerError."""

    def __init__(self, response: Any, url: str) -> None:
        self.response, self.url = response, url

    def __enter__(self) -> _Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.response.close()

    @property
    def is_stream(self) -> bool:
        return str(self.response.headers.get_content_type()) == "text/event-stream"

    @property
    def kind(self) -> str:
        return str(self.response.headers.get_content_type())

    def read(self) -> bytes:
        return self._whole(self.response.read, LONGEST + 1)

    def lines(self) -> Iterator[bytes]:
        while line := self._whole(self.response.readline, LONGEST + 1):
            yield line

    def _whole(self, read: Callable[[int], bytes], most: int) -> bytes:
        try:
            found = read(most)
        except TimeoutError as error:
            raise ServerError(f"{self.url}: fell silent in the middle of its answer (--timeout)") from error
        except (OSError, HTTPException, ValueError) as error:
            raise ServerError(f"{self.url}: the answer broke off: {_clipped(first_line(error))}") from error
        if len(found) >= most:
            raise ServerError(f"{self.url}: answers without an end ({most:,} bytes and more)")
        return found


def _opener(url: str) -> OpenerDirector:
    """By the environment's proxies, but to this machine itself."""
    host = urlsplit(url).hostname or ""
    return build_opener(_NoRedirect, *([ProxyHandler({})] if LOOPBACK.fullmatch(host) else []))


def _events(answer: _Answer, url: str) -> Iterator[dict[str, Any]]:
    """The objects of a stream; of a server that does not stream, its one answer."""
    if not answer.is_stream:
        yield _json(answer, url)
        return
    for line in answer.lines():
        name, _, text = line.decode("utf-8", "replace").partition(":")
        if name == "data" and text.strip() == "[DONE]":
            return
        if name == "data":
            yield _object(text, url, "a piece of its answer")


def _json(answer: _Answer, url: str) -> dict[str, Any]:
    return _object(answer.read().decode("utf-8", "replace"), url, f"its answer ({answer.kind})")


def _object(text: str, url: str, what: str) -> dict[str, Any]:
    """Raises ServerError for what is no JSON object, and for one that is an error: with status 200, too."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ServerError(f"{url}: {what} is not a JSON object: {_clipped(text)!r}; is that the API's address?")
    if found.get("error"):
        raise ServerError(f"{url}: {_reason(text.encode())}")
    choices = found.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise ServerError(f"{url}: {what} has choices that are none: {_clipped(text)!r}")
    return found


def _usage(event: Mapping[str, Any]) -> int | None:
    usage = event.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None


def _said(choice: Mapping[str, Any]) -> tuple[str, bool]:
    """Text of a choice or of a piece of it, and whether it reasons."""
    part = choice.get("delta") or choice.get("message") or choice
    part = part if isinstance(part, dict) else {}
    text = part.get("content") if "content" in part else part.get("text")
    return text if isinstance(text, str) else "", bool(part.get("reasoning_content") or part.get("reasoning"))


def _reason(body: bytes) -> str:
    """What an error's body says, in the forms that servers give it."""
    text = body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    for name in ("error", "message", "detail", "msg"):
        if isinstance(found, list) and found:
            found = found[0]
        found = found[name] if isinstance(found, dict) and found.get(name) else found
    return _clipped(found if isinstance(found, str) else text)


def _clipped(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}…"


def _unreachable(url: str, error: Exception, seconds: float) -> ServerError:
    reason = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
    if isinstance(reason, TimeoutError):
        return ServerError(f"{url}: gave no answer within {seconds:g} s; is it still loading, or busy? (--timeout)")
    if isinstance(reason, ConnectionRefusedError):
        return ServerError(f"{url}: no server listens there; `qft serve` prints the line that starts one")
    said = _clipped(first_line(reason))
    return ServerError(f"{url}: cannot be asked: {said}")
