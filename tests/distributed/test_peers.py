"""Processes that watch each other."""

from __future__ import annotations

import threading
from multiprocessing.connection import Client
from typing import Any

import pytest

from qft.distributed import peers


@pytest.mark.parametrize("said", [None, b"", b"another 1", b"\xff", b"x" * 100])
def test_a_stranger_is_no_process_and_ends_nothing(said: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    told: dict[str, Any] = {}
    listens = threading.Event()

    def tell(what: Any) -> Any:
        told.setdefault("what", what)
        listens.set()
        return told["what"]

    def others() -> None:
        listens.wait()
        with Client(("127.0.0.1", told["what"][0])) as stranger:
            if said is not None:
                stranger.send_bytes(said)
        with peers.watched(1, 2, lambda _: told["what"]):
            pass

    second = threading.Thread(target=others)
    second.start()
    with peers.watched(0, 2, tell):
        second.join(20)
    assert not second.is_alive()
