"""TARGET@vllm: a server is started on it by another Python, asked, and stopped, whatever comes between."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from qft.errors import ModelError, RecipeError, ServerError
from qft.model.target import parse_target
from qft.serving.client import Server
from qft.serving.formats import formats_in
from qft.serving.server import free_port, running
from tests.support.cli import qft
from tests.support.once import once
from tests.support.runs import trained
from tests.support.servers import LOG_PROB, vllm_python

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}


@pytest.fixture
def export(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A model that says it is the export of a run which lies elsewhere."""
    run = once(tmp_path_factory, "trained", lambda folder: trained(folder, tiny_model)) / "run"
    folder = tmp_path / "merged"
    shutil.copytree(tiny_model, folder)
    mark = {"schema_version": 1, "kind": "export", "target": "merged", "passed": None, "sha256": {}, "run": str(run)}
    (folder / "export.json").write_text(json.dumps(mark))
    return folder


def quantized(folder: Path, *groups: dict[str, Any]) -> None:
    path = folder / "config.json"
    found = {"quant_method": "compressed-tensors", "config_groups": dict(enumerate(groups))}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": found}))


def test_an_exports_rows_are_those_of_its_run_and_its_server_is_stopped(export: Path, tmp_path: Path) -> None:
    python, name = vllm_python(tmp_path), f"{export}@vllm"
    ran = qft("eval", name, "--engine-python", python, "--concurrency", 2, "--context", 64, "--json")
    assert ran.exit_code == 0, ran.stderr
    document = json.loads(ran.stdout)
    [target] = document["targets"]
    assert (target["name"], document["device"]) == (name, "vLLM 0.32.0, cpu")
    assert target["perplexity"] == pytest.approx(math.exp(-LOG_PROB))
    assert target["scores"]["exact_match"]["value"] is not None
    served = target["served_by"]
    assert (served["engine"], served["version"], served["seconds_to_start"] > 0) == ("vllm", "0.32.0", True)
    assert [load["concurrent"] for load in served["loads"]] == [2]
    words = json.loads((export / "words").read_text())
    assert words[words.index("--max-model-len") + 1] == "64"
    assert "--no-enable-prefix-caching" in words
    assert (export / "stopped").exists()


def test_a_conversation_ends_with_its_server(export: Path, tmp_path: Path) -> None:
    python = vllm_python(tmp_path)
    ran = qft("chat", f"{export}@vllm", "--engine-python", python, "--prompt", "say a")
    assert (ran.exit_code, ran.stdout) == (0, "a\n"), ran.stderr
    assert (export / "stopped").exists()
    (export / "broken").touch()
    ran = qft("chat", f"{export}@vllm", "--engine-python", python, "--prompt", "say a")
    assert (ran.exit_code, ran.stdout) == (6, "")
    assert "vLLM 0.32.0: ValueError: no kernel for it" in ran.stderr


def test_what_vllm_does_not_load_is_refused_before_it_is_started(export: Path, tmp_path: Path) -> None:
    # as a remedy leaves them
    quantized(export, *[{"weights": group, "input_activations": None} for group in (INT8 | {"num_bits": 4}, INT8)])
    ran = qft("eval", f"{export}@vllm", "--engine-python", vllm_python(tmp_path))
    assert ran.exit_code == 4
    assert "W8A16 on a CPU, which says: Failed to find a kernel" in ran.stderr
    assert not (export / "words").exists()


def test_what_is_interrupted_or_ends_by_itself_leaves_no_server(export: Path, tmp_path: Path) -> None:
    port = free_port()
    server = Server.of(f"http://127.0.0.1:{port}")
    words = ["--model", export, "--served-model-name", "m", "--port", port]
    command = [*map(str, [vllm_python(tmp_path), "-I", "-m", "vllm.entrypoints.openai.api_server", *words])]

    def interrupted() -> None:
        with running(command, server, "it", {}):
            assert server.models() == ["m"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (export / "stopped").exists()
    with pytest.raises(ServerError, match="no server listens"):
        server.models()
    (export / "broken").touch()
    with pytest.raises(ModelError, match="it: ValueError: no kernel for it"), running(command, server, "it", {}):
        pass


def test_formats_are_told_from_configurations(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text("{}")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "use_dora": True}))
    assert (formats_in(base), formats_in(adapter)) == (
        ["merged"],
        ["adapter on a 16-bit base, with DoRA or modules_to_save"],
    )
    quantized(base, {"weights": INT8, "input_activations": {"dynamic": True}})
    assert formats_in(base) == ["compressed-tensors W8A8 dynamic"]
    quantized(base, {"weights": INT8 | {"type": "float"}, "input_activations": {"dynamic": False}})
    assert formats_in(base) == ["compressed-tensors FP8 static"]
    (base / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    assert formats_in(base) == ["bnb-4bit"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("eval", "x", "--engine-python", "p"), "name TARGET so"),
        (("eval", "x@vllm", "--url", "http://127.0.0.1:1"), "leave out one of them"),
        (("chat", "x@vllm", "--image", "a.png"), "--image: not with @vllm"),
        (("chat", "nowhere/x@vllm", "--prompt", "Hi"), "nowhere/x: is not there"),
        (("eval", "nowhere/x@vllm", "other"), "evaluate it apart"),
    ],
)
def test_what_makes_no_sense_is_refused(words: tuple[str, ...], text: str) -> None:
    ran = qft(*words)
    assert (ran.exit_code in (2, 3), text in " ".join(ran.stderr.split())) == (True, True), ran.stderr


def test_without_an_environment_it_is_asked_for(export: Path) -> None:
    ran = qft("eval", f"{export}@vllm")
    assert (ran.exit_code, "--engine-python: name the Python" in ran.stderr) == (2, True)
    with pytest.raises(RecipeError, match="asked of vLLM's server"):
        parse_target(f"{export}@vllm", adapter=None, data=None)
