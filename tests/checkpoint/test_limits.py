"""What a configuration or a header asks for is what its files can hold, and what is read is a file."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from qft.checkpoint.header import header
from qft.checkpoint.limits import require_counts
from qft.errors import MissingError, ModelError
from qft.gguf.file import write_gguf
from qft.model.target import parse_target
from qft.plan.model import ModelPlan, plan_model
from qft.recipe.load import from_values
from tests.support.cli import qft
from tests.support.models import CHATML, byte_tokenizer, tiny_llama

pytestmark = pytest.mark.usefixtures("bounded")

HUGE = 10**9


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def planned(path: Path) -> ModelPlan:
    model = {"path": str(path), "device": "cpu"}
    return plan_model(from_values({"model": model, "data": {"train": "-"}, "output_dir": "-"}))


def configured(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": HUGE},
        {"num_hidden_layers": 512},
        {"num_hidden_layers": -1},
        {"model_type": "qwen2", "num_hidden_layers": HUGE},
        {"model_type": "gpt2", "n_layer": HUGE},
        {"model_type": "mpt", "n_layers": HUGE},
        {"model_type": "mixtral", "num_local_experts": HUGE},
        {"model_type": "deepseek_v3", "n_routed_experts": HUGE},
        {"model_type": "gemma3", "text_config": {"num_hidden_layers": HUGE}},
        {"vocab_size": 10**12},
        {"hidden_size": 10**12},
        {"intermediate_size": 2**62},
        {"num_attention_heads": HUGE},
        {"head_dim": 10**12},
    ],
    ids=str,
)
def test_more_than_the_files_hold_is_refused_before_it_is_built(changes: dict[str, Any], model: Path) -> None:
    with pytest.raises(ModelError, match=f"{model}: (its configuration asks for|.* cannot be built)"):
        planned(configured(model, **changes))


@pytest.mark.parametrize("text", ["", "garbage", "[]", "null", '{"model_type": ["llama"]}', '{"a":' * 5000])
def test_a_configuration_that_is_none(text: str, model: Path) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(ModelError, match=str(model)):
        planned(model)


def test_real_configurations_are_within_the_limits() -> None:
    """Of models as large as there are, whose files hold far more tensors than the library's defaults have layers."""
    for kind in ("llama", "qwen3_moe", "deepseek_v3", "gpt2", "gpt_neox", "mixtral", "gemma3_text", "phi", "falcon"):
        require_counts(kind, AutoConfig.for_model(kind).to_dict(), 0)


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("gguf")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    write_gguf(folder, folder / "tiny.gguf", kind="f16")
    return (folder / "tiny.gguf").read_bytes()


def at(data: bytes, offset: int, kind: str, number: int) -> bytes:
    made = bytearray(data)
    struct.pack_into(kind, made, offset, number)
    return bytes(made)


def behind(data: bytes, key: bytes, offset: int, kind: str, number: int) -> bytes:
    """With another number `offset` bytes behind the end of a key."""
    return at(data, data.index(key) + len(key) + offset, kind, number)


GGUF: dict[str, Callable[[bytes], bytes]] = {
    "tensors": lambda data: at(data, 8, "<Q", 10**12),
    "pairs": lambda data: at(data, 16, "<Q", 10**12),
    "the length of a key": lambda data: at(data, 24, "<Q", 2**63),
    "the length of an array of strings": lambda data: behind(data, b"ggml.tokens", 8, "<Q", 10**12),
    "the length of an array of numbers": lambda data: behind(data, b"ggml.token_type", 8, "<Q", 10**15),
    "blocks": lambda data: behind(data, b"block_count", 4, "<I", HUGE),
    "heads": lambda data: behind(data, b"head_count", 4, "<I", HUGE),
    "the vocabulary": lambda data: behind(data, b"vocab_size", 4, "<I", 2**31),
    "the hidden size": lambda data: behind(data, b"embedding_length", 4, "<I", 2**31),
    "an unknown type": lambda data: behind(data, b"block_count", 0, "<I", 99),
    "arrays in arrays": lambda data: behind(data, b"ggml.tokens", 4, "<I", 9),
    "another version": lambda data: at(data, 4, "<I", 9),
    "half a header": lambda data: data[:999],
    "half its weights": lambda data: data[: len(data) - 9999],
    "nothing": lambda data: data[:4],
}


@pytest.mark.parametrize("damage", GGUF.values(), ids=GGUF)
def test_a_gguf_header_is_not_believed(damage: Callable[[bytes], bytes], gguf_bytes: bytes, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(gguf_bytes)
    assert header(tmp_path / "tiny.gguf").values["llama.block_count"] == 2
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(gguf_bytes))
    with pytest.raises(ModelError, match=str(path)):
        planned(path)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def bound(path: Path) -> None:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # the path of a socket is short
        server.bind(path.name)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("special", [pipe, bound, device])
def test_what_is_no_file_is_not_read(
    special: Callable[[Path], None], recipe_file: Callable[..., Path], model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """A recipe, what it extends, rows, a template, a plugin, a file of a model, a GGUF file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jinja").write_text(CHATML)
    names = ("odd.yaml", "odd.jsonl", "odd.jinja", "odd.py", "odd.gguf", "odd.txt")
    for name in names:
        special(tmp_path / name)
    custom = {"mode": "custom", "plugin": "odd.py", "preset": ...}
    found = [
        qft("check", tmp_path / "odd.yaml"),
        qft("check", recipe_file(extends="odd.yaml")),
        qft("check", recipe_file(data={"train": "odd.jsonl"})),
        qft("check", recipe_file(data={"chat_template": "odd.jinja"})),
        qft("check", recipe_file(quant=custom)),
        qft("check", recipe_file(model={"path": str(tmp_path / "odd.gguf")}, quant=None)),
        qft("eval", model, "--data", tmp_path / "odd.txt"),
    ]
    for name in ("tokenizer.json", "config.json", "generation_config.json", "model.safetensors"):
        kept = (model / name).read_bytes()
        special(model / name)
        found.append(qft("check", recipe_file(model={"path": str(model)})))
        (model / name).unlink()
        (model / name).write_bytes(kept)
    assert {result.exit_code for result in found} <= {MissingError.exit_code, ModelError.exit_code}
    assert [result.stderr for result in found if len(result.stderr.splitlines()) != 1] == []


def test_a_run_or_an_adapter_of_pipes(model: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "adapter_config.json", "report.json"):
        (tmp_path / name).mkdir()
        os.mkfifo(tmp_path / name / name)
    talked = qft("chat", tmp_path / "manifest.json", "--prompt", "x").exit_code
    assert talked in (MissingError.exit_code, ModelError.exit_code)
    assert qft("report", tmp_path / "report.json").exit_code == MissingError.exit_code
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    os.mkfifo(adapter / "adapter_model.safetensors")
    with pytest.raises(MissingError, match="is a pipe"):
        parse_target(str(model), adapter=adapter, data=None)
