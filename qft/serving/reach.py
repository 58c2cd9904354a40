"""A server reached over HTTP: by which proxy, key and certificate, again where it cannot answer now, and what it then
answers. Whatever fails is one ServerError."""

from __future__ import annotations

import json
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPException, HTTPMessage
from ipaddress import ip_address
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener, getproxies
from urllib.request import proxy_bypass as goes_past_proxies

from qft.errors import RecipeError, ServerError, first_line

KEY = "QFT_API_KEY"
"""Variable of the environment whose value is sent to a server that wants a key. No other program's is."""
PAUSES = (1.0, 4.0)
"""Seconds until it is asked again what it could not answer now, unless it says itself when."""
LONGEST_PAUSE = 60
"""Seconds that are waited if it says so."""
NOT_NOW = (429, 500, 502, 503, 504)
"""HTTP statuses of a server that may answer the next time."""
LONGEST = 2**24
"""Bytes of an answer, or of one piece of it, that are read."""
SHOWN = 300
"""Characters of what a server says that a message shows."""
REMEDIES = {
    401: f"it wants a key: put it into {KEY}",
    403: f"it wants another key: put it into {KEY}",
    404: "is that the API's address? Most end in /v1",
    429: "it has too much to do: ask fewer at once",
    503: "it may still be loading; ask again, or see its log",
}
"""By HTTP status."""


class _NoRedirect(HTTPRedirectHandler):
    """A question that is sent on arrives as another one."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


class HttpAnswer:
    """What a server answers, closed once it is left; what breaks it off is a ServerError."""

    def __init__(self, response: Any, url: str) -> None:
        self.response, self.url = response, url

    def __enter__(self) -> HttpAnswer:
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
        found = self._whole(self.response.read, LONGEST + 1)
        if self.response.length:  # it has told how much there is
            raise ServerError(f"{self.url}: the answer broke off after {len(found):,} bytes")
        return found

    def lines(self) -> Iterator[bytes]:
        while line := self._whole(self.response.readline, LONGEST + 1):
            yield line

    def _whole(self, read: Callable[[int], bytes], most: int) -> bytes:
        try:
            found = read(most)
        except TimeoutError as error:
            raise ServerError(f"{self.url}: fell silent in the middle of its answer (--timeout)") from error
        except (OSError, HTTPException, ValueError) as error:
            raise ServerError(f"{self.url}: the answer broke off: {clipped(first_line(error))}") from error
        if len(found) >= most:
            raise ServerError(f"{self.url}: answers without an end ({most:,} bytes and more)")
        return found


def opened(base: str, path: str, body: Mapping[str, Any] | None, seconds: float) -> HttpAnswer:
    """What the server at `base` answers, once it does: what it cannot answer now it is asked again. None is a GET."""
    headers = {"Content-Type": "application/json", "User-Agent": "qft"}
    if key := _key():
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    for pause in (*PAUSES, None):
        try:
            request = Request(base + path, data, headers)  # noqa: S310  # http or https, as `of` has it
            return HttpAnswer(_opener(base).open(request, timeout=seconds), base)
        except HTTPError as error:
            wait = _pause(error, pause)
            if wait is None:
                raise _refusal(base + path, error) from error
            error.close()
            time.sleep(wait)
        except (OSError, HTTPException, ValueError) as error:
            if pause is None or not _was_cut_off(error):
                raise _unreachable(base, error, seconds) from error
            time.sleep(pause)
    raise AssertionError("the last is no pause")


def _was_cut_off(error: Exception) -> bool:
    """Whether the connection was reset, as one is that takes more of them than it can hold; not where it was closed."""
    reason = error.reason if isinstance(error, URLError) else error
    return isinstance(reason, ConnectionResetError) and not isinstance(reason, HTTPException)


def _refusal(url: str, error: HTTPError) -> ServerError:
    with error:
        try:
            said = reason_of(error.read(LONGEST))
        except (OSError, HTTPException):
            said = ""
    remedy = REMEDIES.get(error.code, "its log says more" if error.code >= 500 else "")
    if 300 <= error.code < 400:
        remedy = f"it sends on to {clipped(error.headers.get('Location', 'nowhere'))}; give that address"
    told = "; ".join(filter(None, (said, remedy)))
    return ServerError(f"{url}: answered {error.code} {clipped(error.reason)}: {told}".rstrip(": "), error.code)


def _key() -> str | None:
    """Raises RecipeError, which does not show it, for what no header takes."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise RecipeError(f"{KEY}: holds characters that no key has, a line break or letters beyond ASCII")
    return key or None


def _pause(error: HTTPError, pause: float | None) -> float | None:
    """Seconds until the server is asked again; None: it is not."""
    if pause is None or error.code not in NOT_NOW:
        return None
    told = str(error.headers.get("Retry-After", "")).strip()
    seconds = float(told) if told.isascii() and told.isdigit() else pause
    return seconds if seconds <= LONGEST_PAUSE else None


def _opener(url: str) -> OpenerDirector:
    """By the environment's proxies, but to this machine itself."""
    host = urlsplit(url).hostname or ""
    return build_opener(_NoRedirect, *([ProxyHandler({})] if _is_here(host) else []))


def _is_here(host: str) -> bool:
    """Whether an address is of this machine; one that a server listens on (0.0.0.0) is, too."""
    if re.fullmatch(r"(.+\.)?localhost\.?", host):
        return True
    try:
        found = ip_address(host)
    except ValueError:
        return False
    found = getattr(found, "ipv4_mapped", None) or found
    return found.is_loopback or found.is_unspecified


def _proxy(url: str) -> str | None:
    """The variable that names the proxy by which it is asked; never the proxy, which may hold a password."""
    scheme, host = urlsplit(url).scheme, urlsplit(url).hostname or ""
    asked = scheme in getproxies() and not _is_here(host) and not goes_past_proxies(host)
    return f"{scheme}_proxy" if asked else None


def reason_of(body: bytes) -> str:
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
    return clipped(found if isinstance(found, str) else text)


def clipped(text: str) -> str:
    """On one line, and without the key, which some servers repeat."""
    key = _key()
    line = " ".join((text.replace(key, f"[{KEY}]") if key else text).split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}…"


def _unreachable(url: str, error: Exception, seconds: float) -> ServerError:
    reason = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
    if isinstance(reason, TimeoutError):
        return ServerError(f"{url}: gave no answer within {seconds:g} s; is it still loading, or busy? (--timeout)")
    by = f"by the proxy of {proxy}: " if (proxy := _proxy(url)) else ""
    if isinstance(reason, ConnectionRefusedError) and not by:
        return ServerError(f"{url}: no server listens there; `qft serve` prints the line that starts one")
    if isinstance(reason, ssl.SSLCertVerificationError):
        text = f"its certificate is not trusted ({reason.verify_message}); SSL_CERT_FILE names a file of authorities"
        return ServerError(f"{url}: {text}")
    remedy = "; does it speak http alone?" if isinstance(reason, ssl.SSLError) else ""
    return ServerError(f"{url}: cannot be asked: {by}{clipped(first_line(reason))}{remedy}")
