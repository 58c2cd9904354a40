"""A server's answers, as they come and as they fail."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest

from qft.errors import RecipeError, ServerError
from qft.serving.client import Server
from qft.serving.load import load_of, loads
from tests.support.servers import as_json, serving, streamed

CHAT = "/chat/completions"


def said(answer: tuple[int, str, bytes], silence: float = 10) -> Any:
    with serving(lambda path, body: answer) as (url, _):
        return Server.of(url, silence).ask(CHAT, {"model": "tiny"})


@pytest.mark.parametrize(
    ("given", "url"),
    {
        "http://h:1": "http://h:1/v1",
        "http://h:1/": "http://h:1/v1",
        "http://h:1/v1/": "http://h:1/v1",
        "https://h/api/v1/chat/completions": "https://h/api/v1",
        "http://[::1]:8000/v1/completions": "http://[::1]:8000/v1",
    }.items(),
)
def test_addresses_as_people_give_them(given: str, url: str) -> None:
    assert Server.of(given).url == url


@pytest.mark.parametrize("given", ["h:1", "", "ftp://h", "http://", "http://h:99999", "http://h?a=1", "http://u:p@h"])
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(RecipeError, match="--url"):
        Server.of(given)


def test_pieces_are_shown_as_they_come_and_counted_by_the_server() -> None:
    pieces: list[str] = []
    with serving(lambda path, body: streamed("a", "", "ü b", tokens=7)) as (url, asked):
        written = Server.of(url).ask(CHAT, {"model": "tiny"}, pieces.append)
    assert (pieces, written.text, written.tokens, written.ended) == (["a", "ü b"], "aü b", 7, True)
    assert 0 < written.seconds_to_first <= written.seconds
    assert asked[0][1]["stream"] is True


def test_pieces_count_where_the_server_does_not_and_length_is_no_end() -> None:
    written = said(streamed("a", "b", finish="length"))
    assert (written.tokens, written.ended, written.counted) == (2, False, False)
    nothing = said(streamed(tokens=0))
    assert (nothing.tokens, nothing.counted, nothing.text) == (0, True, "")


def test_a_server_that_does_not_stream_and_completions_without_chat() -> None:
    whole = {"choices": [{"message": {"content": "all"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 3}}
    assert (said(as_json(whole)).text, said(as_json(whole)).tokens) == ("all", 3)
    assert said(as_json({"choices": [{"text": "t", "finish_reason": "stop"}]})).text == "t"
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "p"}, {"type": "text", "text": "q"}]
    assert said(as_json({"choices": [{"message": {"content": parts}, "finish_reason": "stop"}]})).text == "pq"


@pytest.mark.parametrize("count", [-5, True, 2.0, "3", None])
def test_a_count_that_is_none_is_not_told(count: Any) -> None:
    whole = {"choices": [{"text": "t", "finish_reason": "stop"}], "usage": {"completion_tokens": count}}
    assert (said(as_json(whole)).tokens, said(as_json(whole)).counted) == (1, False)


def test_of_several_answers_the_first_is_taken() -> None:
    several = [{"index": n, "message": {"content": text}, "finish_reason": "stop"} for n, text in enumerate("ab")]
    assert said(as_json({"choices": several})).text == "a"


@pytest.mark.parametrize(
    ("answer", "words", "status"),
    [
        (as_json({"error": {"message": "no such model"}}, 404), "answered 404 Not Found: no such model", 404),
        (as_json({"error": "out of memory"}, 500), "500 .*: out of memory; its log", 500),
        (as_json({"detail": [{"loc": ["x"], "msg": "wrong"}]}, 422), "422 .*: wrong", 422),
        ((401, "text/plain", b""), "401 .*QFT_API_KEY", 401),
        ((302, "text/plain", b""), "302 .*give that address", 302),
        ((200, "text/html", b"<html>hello"), "not a JSON object: '<html>hello'", None),
        (as_json({"choices": 3}), "choices that are none", None),
        (as_json({"choices": [{"delta": "abc", "finish_reason": "stop"}]}), "choices that are none", None),
        (as_json({"choices": [{"message": {"content": 7}, "finish_reason": "stop"}]}), "choices that are none", None),
        (as_json([1]), "not a JSON object", None),
        ((200, "text/event-stream", b"data: {nonsense\n\n"), "not a JSON object: '{nonsense'", None),
        ((200, "text/event-stream", b'data: {"error": {"message": "engine died"}}\n\n'), "engine died", None),
        ((200, "text/event-stream", b""), "broke off after 0", None),
        (streamed("a", finish=None, done=False), "broke off after 1", None),
        (streamed("a", finish=None), "broke off after 1", None),
    ],
)
def test_each_failure_is_told(answer: tuple[int, str, bytes], words: str, status: int | None) -> None:
    with pytest.raises(ServerError, match=words) as caught:
        said(answer)
    assert (caught.value.status, caught.value.exit_code) == (status, 11)


def test_a_server_that_is_down_and_one_that_is_silent() -> None:
    with socket.socket() as quiet:
        quiet.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{quiet.getsockname()[1]}"
        with pytest.raises(ServerError, match="no server listens there"):
            Server.of(url).models()
        quiet.listen()
        with pytest.raises(ServerError, match=r"no answer within 0\.05 s"):
            Server.of(url, 0.05).ask(CHAT, {})


def test_one_model_is_taken_and_several_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QFT_API_KEY", "key")
    with serving(lambda path, body: streamed()) as (url, asked):
        assert Server.of(url).find_model(None) == Server.of(url).find_model("tiny") == "tiny"
        with pytest.raises(ServerError, match=r"no model other .*; there: tiny"):
            Server.of(url).find_model("other")
    assert asked[0][1]["authorization"] == "Bearer key"
    with serving(lambda path, body: streamed(), ("a:latest", "b")) as (url, _):
        assert Server.of(url).find_model("a") == "a"
        with pytest.raises(RecipeError, match="--model"):
            Server.of(url).find_model(None)
    with serving(lambda path, body: (404, "text/plain", b"no"), ()) as (url, _):
        assert Server.of(url).find_model("given") == "given"
        with pytest.raises(ServerError, match="Most end in /v1"):
            Server.of(url).find_model(None)


def test_requests_at_once_are_at_once() -> None:
    together = threading.Barrier(8)

    def slow(path: str, body: dict[str, Any]) -> tuple[int, str, bytes]:
        time.sleep(0.03)
        if len(asked) > 5:  # behind the first, and the four that come one by one
            together.wait(60)
        return streamed("a", tokens=10)

    with serving(slow) as (url, asked):
        one, many = loads(lambda number: Server.of(url).ask(CHAT, {}), (1, 8))
    assert (one.requests, many.requests, many.tokens, len(asked)) == (4, 8, 80, 13)
    assert one.first_token_seconds >= 0.03


def test_a_level_counts_all_tokens_over_all_seconds() -> None:
    written = said(streamed("a", tokens=6))
    assert load_of(2, [written, written], 3.0).tokens_per_second == 4
