"""Whether the other processes are still there. A GPU that waits for one of them does so until `distributed.timeout`,
and its host with it, deaf to signals; a connection is closed at once by whatever ends the process behind it."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection, Listener, Pipe, wait
from typing import Any

from qft.errors import RunError

GRACE = 10.0
"""Seconds that this process has to end by itself, and to say why, once another has."""


@contextmanager
def watched(rank: int, size: int, tell: Callable[[Any], Any]) -> Iterator[None]:
    """Within it the first process watches all others, and each of them the first: that one has ended ends this one,
    whatever it waits for. `tell` gives what the first process has."""
    peers, (left, leaves) = _peers(rank, size, tell), Pipe(duplex=False)
    watching = threading.Thread(target=_watch, args=(rank, peers, left), daemon=True)
    watching.start()
    try:
        yield
    finally:
        leaves.send_bytes(b"left")  # not closed alone: processes that were forked meanwhile hold it too
        watching.join()
        for each in (*peers, left, leaves):
            each.close()


def _peers(rank: int, size: int, tell: Callable[[Any], Any]) -> dict[Connection, int]:
    """A connection to each process that is watched, and its rank."""
    if rank:
        port, word = tell(None)
        first = Client((os.environ["MASTER_ADDR"], port))
        first.send_bytes(f"{word} {rank}".encode())
        return {first: 0}
    found: dict[Connection, int] = {}
    with Listener(("", 0), backlog=size) as listener:
        _, word = tell((listener.address[1], uuid.uuid4().hex))
        while len(found) < size - 1:
            peer: Any = listener.accept()
            said = _said(peer)
            if said[:1] == [word]:  # a stranger's ends nothing
                found[peer] = int(said[1])
            else:
                peer.close()
    return found


def _said(peer: Connection) -> list[str]:
    """The words of who has connected; none of one that says nothing, or too much."""
    try:
        return peer.recv_bytes(64).decode(errors="replace").split() if peer.poll(GRACE) else []
    except (EOFError, OSError):
        return []


def _watch(rank: int, peers: Mapping[Connection, int], left: Connection) -> None:
    ended = wait([left, *peers])
    if left not in ended and not left.poll(GRACE):
        text = f"rank {peers[ended[0]]} has ended; --resume goes on from the newest checkpoint"  # type: ignore[index]
        os.write(2, f"error: rank {rank}: {text}\n".encode())
        os._exit(RunError.exit_code)
