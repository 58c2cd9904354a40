"""How a server is reached: asked again where it cannot answer now, past proxies if it is this machine, with a key that
nothing shows; and each way in which it is not."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qft.errors import QftError, RecipeError, ServerError
from qft.serving.client import Server
from qft.serving.load import at_once
from tests.support.servers import Body, as_json, serving, streamed

CHAT = "/chat/completions"


def failing(times: int, status: int) -> Callable[[str, Body], tuple[int, str, bytes]]:
    """Answers so many requests with `status`, and those after it."""
    failures = iter([status] * times)
    return lambda path, body: as_json({"error": "busy"}, found) if (found := next(failures, 0)) else streamed("a")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_a_server_cannot_answer_now_is_asked_again(status: int) -> None:
    with serving(failing(2, status)) as (url, asked):
        assert Server.of(url).ask(CHAT, {}).text == "a"
        assert len(asked) == 3
    with serving(failing(3, status)) as (url, _), pytest.raises(ServerError, match=f"answered {status} .*busy"):
        Server.of(url).ask(CHAT, {})


def hear(near: socket.socket) -> None:
    """Read a question to its end: what is closed before that is reset."""
    heard = near.recv(65536)
    while heard.startswith(b"POST") and not heard.endswith(b"}") and (piece := near.recv(65536)):
        heard += piece


def test_a_connection_that_is_reset_is_made_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            for data in (b"", CUT):
                near, _ = listening.accept()
                with near:
                    hear(near)
                    if data:
                        near.sendall(OK + b"application/json\r\n\r\n" + data)
                    else:
                        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        threading.Thread(target=answer, daemon=True).start()
        assert Server.of(f"http://127.0.0.1:{listening.getsockname()[1]}").ask(CHAT, {}).text == "a"


def test_what_is_wrong_with_a_question_is_asked_once() -> None:
    with serving(failing(9, 400)) as (url, asked):
        with pytest.raises(ServerError, match="answered 400"):
            Server.of(url).ask(CHAT, {})
        assert len(asked) == 1


@contextmanager
def saying(data: bytes, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """A server that answers whatever is asked with these bytes, and closes; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            while True:
                try:
                    near, _ = listening.accept()
                    with tls.wrap_socket(near, server_side=True) if tls else near as near:
                        hear(near)
                        near.sendall(data)
                except OSError:
                    if listening.fileno() < 0:
                        return

        threading.Thread(target=answer, daemon=True).start()
        yield f"{'https' if tls else 'http'}://127.0.0.1:{listening.getsockname()[1]}"


OK = b"HTTP/1.1 200 OK\r\nContent-Type: "
CUT = json.dumps({"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}).encode()
ABORTED = CUT.replace(b"stop", b"abort")
BROKEN = {
    "no HTTP": (b"220 mail ready\r\n", "cannot be asked"),
    "nothing": (b"", "cannot be asked"),
    "fewer bytes than told": (OK + b"application/json\r\nContent-Length: 99\r\n\r\n{", "broke off after 1 bytes"),
    "a piece that is cut": (OK + b"text/event-stream\r\n\r\ndata: " + CUT[:30], "broke off after 0 pieces"),
    "the last piece that is cut": (OK + b"text/event-stream\r\n\r\ndata: " + CUT, "broke off after 0 pieces"),
    "a chunk that is cut": (
        OK + b"text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n40\r\ndata: ",
        "broke off",
    ),
    "later than anybody waits": (b"HTTP/1.1 503 No\r\nRetry-After: 3600\r\n\r\n", "answered 503 No: it may still be"),
    "a date to come again": (b"HTTP/1.1 503 No\r\nRetry-After: Fri, 31 Dec 1999 23:59:59 GMT\r\n\r\n", "answered 503"),
    "a redirect": (b"HTTP/1.1 307 x\r\nLocation: http://127.0.0.1:1/\r\n\r\n", "sends on to http://127.0.0.1:1/; give"),
    "an end that is none": (
        OK + b"text/event-stream\r\n\r\ndata: " + CUT.replace(b"stop", b"abort") + b"\n",
        "by abort",
    ),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", "not a JSON object"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_whatever_a_server_sends_is_one_message(case: str) -> None:
    data, words = BROKEN[case]
    with saying(data) as url, pytest.raises(ServerError, match=words) as caught:
        Server.of(url, 10).ask(CHAT, {"model": "tiny"})
    assert (caught.value.exit_code, "\n" in str(caught.value)) == (11, False)


def test_half_of_a_surrogate_pair_is_no_text_that_cannot_be_written() -> None:
    with serving(lambda path, body: streamed("\ud83d", "b")) as (url, _):
        assert Server.of(url).ask(CHAT, {}).text.encode() == b"?b"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "[::ffff:127.0.0.1]", "[0:0:0:0:0:0:0:1]"])
def test_no_proxy_stands_before_this_machine(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(ServerError, match="by the proxy of http_proxy: ") as caught:
        Server.of("http://gpu.example:8000").models()
    assert "secret" not in str(caught.value)
    family = socket.AF_INET6 if host.count(":") > 3 and "ffff" not in host else socket.AF_INET
    with socket.socket(family) as free:  # nobody listens
        try:
            free.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
        with pytest.raises(ServerError, match="no server listens there"):
            Server.of(f"http://{host}:{free.getsockname()[1]}").models()


def test_a_certificate_that_nobody_vouches_for(tmp_path: Path) -> None:
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(tmp_path / "key")]
    made += ["-out", str(tmp_path / "cert")]
    try:
        subprocess.run(made, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    body = json.dumps({"data": [{"id": "tiny"}]}).encode()
    answer = OK + b"application/json\r\nConnection: close\r\n\r\n" + body
    with saying(answer, context) as url:
        with pytest.raises(ServerError, match=r"certificate is not trusted .*self.signed.*SSL_CERT_FILE"):
            Server.of(url).models()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SSL_CERT_FILE", str(tmp_path / "cert"))
            assert Server.of(url).models() == ["tiny"]
    with saying(b"HTTP/1.0 400 No\r\n\r\n") as url, pytest.raises(ServerError, match="does it speak http alone"):
        Server.of(url.replace("http", "https")).models()


@pytest.mark.parametrize("key", ["sesame\nopen", "sésame", "sesame\u200b"])
def test_a_key_that_no_header_takes_is_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QFT_API_KEY", key)
    with serving(failing(0, 0)) as (url, _), pytest.raises(RecipeError, match="QFT_API_KEY: holds") as caught:
        Server.of(url).models()
    assert "same" not in str(caught.value)


def test_a_key_is_sent_without_its_line_break_and_a_server_that_repeats_it_is_not_quoted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QFT_API_KEY", "sesame\n")

    def repeats(path: str, body: Body) -> tuple[int, str, bytes]:
        return as_json({"error": "no such key: sesame"}, 401)

    with serving(repeats) as (url, asked), pytest.raises(QftError, match=r"no such key: \[QFT_API_KEY\]") as caught:
        Server.of(url).ask(CHAT, {})
    assert ("sesame" in str(caught.value), asked[0][1]["authorization"]) == (False, "Bearer sesame")


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.0, 1e300])
def test_a_silence_that_is_no_time_is_refused(seconds: float) -> None:
    with pytest.raises(RecipeError, match="--timeout"):
        Server.of("http://127.0.0.1:1", seconds)


def test_how_long_the_list_of_models_may_take_is_told_by_the_same_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as quiet, pytest.raises(ServerError, match=r"within 0\.05 s"):
        Server.of(f"http://127.0.0.1:{quiet.getsockname()[1]}", 0.05).models()


def test_the_first_failure_ends_all_and_waits_for_nobody() -> None:
    asked: list[int] = []
    before = set(threading.enumerate())
    hung = threading.Event()

    def ask(number: int) -> int:
        asked.append(number)
        if number == 1:
            raise ServerError("the second")
        hung.wait(120)
        return number

    started = time.perf_counter()
    with pytest.raises(ServerError, match="the second"):
        at_once(ask, range(8), 2)
    assert time.perf_counter() - started < 60
    assert sorted(asked) == [0, 1]
    assert [thread for thread in set(threading.enumerate()) - before if not thread.daemon] == []
    hung.set()


def test_answers_stand_in_the_order_of_their_questions() -> None:
    def ask(number: int) -> Any:
        time.sleep(0.01 * (number == 0))
        return number

    assert at_once(ask, range(9), 4) == list(range(9))
    assert at_once(ask, [], 4) == []
