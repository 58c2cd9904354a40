"""A tiny server that speaks as OpenAI's does, in this process, for what qft makes of each thing that one can say; and a
Python that seems to have vLLM, whose server it is."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

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


LOG_PROB = -0.5
VLLM = f"""#!{sys.executable} -S
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.support.servers import as_vllm
as_vllm(sys.argv[1:])
"""


def vllm_python(folder: Path) -> Path:
    """A program that answers as the Python of an environment with vLLM for a CPU does, as far as qft asks it."""
    path = folder / "python"
    path.write_text(VLLM)
    path.chmod(0o755)
    return path


def as_vllm(words: list[str]) -> None:
    """What that program does. Of a model with a file `broken` it fails to start; told to end, it writes `stopped`."""
    if "-c" in words:
        sys.stdout.write('version 0.32.0\n{"device": "cpu", "packages": {}}\n')
        return
    assert words[:3] == ["-I", "-m", "vllm.entrypoints.openai.api_server"]
    asked = dict(pairwise(words))
    folder = Path(asked["--model"])
    (folder / "words").write_text(json.dumps(words))
    if (folder / "broken").exists():
        sys.stdout.write("(Worker pid=7) ERROR 11-26 10:09:35 [executor.py:953] ValueError: no kernel for it\n")
        sys.exit("RuntimeError: Engine core initialization failed. See root cause above.")
    ends = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ends.set())
    with serving(echoes, (asked["--served-model-name"],), int(asked["--port"])):
        ends.wait()
    (folder / "stopped").touch()


def as_json(value: Any, status: int = 200) -> tuple[int, str, bytes]:
    return status, "application/json", json.dumps(value).encode()


def echoes(path: str, body: dict[str, Any]) -> tuple[int, str, bytes]:
    """Says the last word of the question; reads any token with the same log probability."""
    if path.endswith("/completions") and body.get("echo"):
        told = [None, *[LOG_PROB] * len(body["prompt"])]
        return as_json({"choices": [{"logprobs": {"token_logprobs": told}}]})
    if body.get("ignore_eos"):
        return as_json({"error": {"message": "unknown field ignore_eos"}}, 400)
    asked = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    return streamed(*asked.split()[-1], tokens=3)


@contextmanager
def serving(
    answers: Answers, models: tuple[str, ...] = ("tiny",), port: int = 0
) -> Iterator[tuple[str, list[tuple[str, Body]]]]:
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

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
