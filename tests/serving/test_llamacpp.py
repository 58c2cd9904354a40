"""llama.cpp's own server, started by the line that `qft serve` prints, and asked.

QFT_LLAMA_SERVER is the path of its program, unless it is on the search path.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest

from qft.export import export
from qft.progress import View
from qft.serving.client import Server
from qft.serving.server import free_port, running
from tests.support.cli import qft
from tests.support.exports import options
from tests.support.once import once
from tests.support.runs import trained

PROGRAM = os.environ.get("QFT_LLAMA_SERVER") or shutil.which("llama-server")
pytestmark = pytest.mark.skipif(
    not PROGRAM, reason="llama-server is not on the search path, nor named by QFT_LLAMA_SERVER"
)
ODD = 'it\'s "a, b"; $x = {é} #1'


def test_llamacpps_server_takes_the_line_and_answers(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> None:
    run = once(tmp_path_factory, "trained", lambda folder: trained(folder, tiny_model)) / "run"
    export(run, options("gguf-f16", out=tmp_path / ODD, gate=False), View())
    port = free_port()
    printed = qft("serve", tmp_path / ODD / "gguf-f16", "--force", "--name", "my model", "--port", port)
    assert printed.exit_code == 0, printed.stderr
    command = [str(PROGRAM), *shlex.split(printed.stdout)[1:]]
    url = f"http://127.0.0.1:{port}"
    with running(command, Server.of(url), "llama-server", {}):
        asked = qft("eval", run, "--url", url, "--concurrency", 2, "--out", tmp_path / "out", "--json")
        said = qft("chat", "--url", url, "--max-new-tokens", 4, "--prompt", "say a", "--json")
    assert asked.exit_code == 0, asked.stderr
    document = json.loads(asked.stdout)
    [target] = document["targets"]
    assert (document["rows"] > 0, target["scores"]["exact_match"]["value"] is not None) == (True, True)
    assert target["served_by"]["model"] == "my model"
    [load] = target["served_by"]["loads"]
    assert (load["concurrent"], load["requests"], load["tokens"]) == (2, 4, 128)  # it takes ignore_eos, and counts
    assert "does not count tokens" not in asked.stderr
    assert (said.exit_code, 0 < json.loads(said.stdout)["tokens"] <= 4) == (0, True), said.stderr
