"""A tiny server that speaks as OpenAI's does, in this process, for what qft makes of each thing that one can say."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Answers = Callable[[str, Body], tuple[int, str, bytes]]
"""From the path and the body of a request (empty for a GET) to the status, the kind and the bytes that it answers."""


def events(*pieces: str, finish: str | None = "stop", tokens: int | None = None, done: bool = True) -> bytes:
    """A streamed answer of these pieces."""
    sent: list[Body] = [{"choices": [{"delta": {"role": "assistant"}}]}]
    sent += [{"choices": [{"delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    sent += [{"choices": [{"delta": {}, "finish_reason": finish}]}] if finish else []
    sent += [{"choices": [], "usage": {"completion_tokens": tokens}}] if tokens is not None else []
    lines = [f"data: {json.dumps(each)}\n\n" for each in sent] + ["data: [DONE]\n\n"] * done
    return ": alive\n\n".join(lines).encode()


def streamed(*pieces: str, **how: Any) -> tuple[int, str, bytes]:
    return 200, "text/event-stream", events(*pieces, **how)


def as_json(value: Any, status: int = 200) -> tuple[int, str, bytes]:
    return status, "application/json", json.dumps(value).encode()


@contextmanager
def serving(answers: Answers, models: tuple[str, ...] = ("tiny",)) -> Iterator[tuple[str, list[tuple[str, Body]]]]:
    """Its address, and what was asked of it so far: path and body."""
    asked: list[tuple[str, Body]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({}, as_json({"data": [{"id": name} for name in models]}) if models else None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))), None)

        def _answer(self, body: Body, known: tuple[int, str, bytes] | None) -> None:
            asked.append((self.path, body | {"authorization": self.headers["Authorization"]}))
            status, kind, data = known or answers(self.path, body)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
