"""What is kept of GGUF files: the same as is read, never old, never in the way."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.gguf_reader import GGUFReader
from transformers import AutoConfig, AutoTokenizer

from qft.checkpoint import cache
from qft.checkpoint.find import Checkpoint, find_checkpoint, load_tokenizer
from qft.checkpoint.quick_gguf import quick_gguf
from qft.checkpoint.weights import dequantized
from qft.gguf.file import write_gguf
from qft.recipe import load
from tests.support.models import CHATML, package_model, tiny_llama

RecipeFile = Callable[..., Path]
Read = Callable[[Path], tuple[Checkpoint, Any]]


@pytest.fixture
def kept_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("QFT_CACHE", str(folder))
    return folder / "gguf"


@pytest.fixture
def model_file(tmp_path: Path, tiny_model: Path) -> Path:
    write_gguf(tiny_model, tmp_path / "models" / "m.gguf", kind="f16")
    return tmp_path / "models" / "m.gguf"


@pytest.fixture
def read(recipe_file: RecipeFile) -> Read:
    def read(path: Path) -> tuple[Checkpoint, Any]:
        recipe = load(recipe_file(model={"path": str(path)})).recipe
        checkpoint = find_checkpoint(recipe)
        return checkpoint, load_tokenizer(checkpoint, recipe)

    return read


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each file that the slow reader of transformers goes through."""
    found: list[str] = []

    class Reading(GGUFReader):  # type: ignore[misc]
        def __init__(self, path: Any, *arguments: Any) -> None:
            found.append(Path(path).name)
            super().__init__(path, *arguments)

    monkeypatch.setattr(gguf, "GGUFReader", Reading)
    return found


def facts(checkpoint: Checkpoint, tokenizer: Any) -> dict[str, Any]:
    text = "<|im_start|>user\nHello  there, 12345: äöü\n<|im_end|>"
    return {
        "config": (type(checkpoint.config), checkpoint.config.to_dict()),
        "class": type(tokenizer),
        "backend": tokenizer.backend_tokenizer.to_str(),
        "arguments": tokenizer.init_kwargs,
        "special": tokenizer.special_tokens_map,
        "ids": tokenizer(text)["input_ids"],
        "chat": tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False),
        "sides": (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length),
    }


def sentencepiece(path: Path) -> Path:
    """A Gemma 3, whose merges are made of its vocabulary: AutoTokenizer would not read it back as it was."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<|im_start|>", "<|im_end|>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens = [*special, *map(chr, range(33, 127)), "▁", "He", "ll", "Hell", "Hello", "th", "the", "▁the"]
    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(path, "gemma3")
    for name, value in {
        "context_length": 512,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 128,
    }.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types([3] * 6 + [6] * 256 + [1] * (len(tokens) - 262))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_chat_template(CHATML)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["llama", "gemma", pytest.param("package", marks=pytest.mark.real)])
def test_what_is_kept_is_what_is_read(
    kind: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    kept_in: Path,
    read: Read,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "package":
        path = package_model()
    else:
        path = (
            request.getfixturevalue("model_file") if kind == "llama" else sentencepiece(tmp_path / "models" / "g.gguf")
        )
    first, again = facts(*read(path)), facts(*read(path))
    assert len(list(kept_in.iterdir())) == 2
    assert first == again
    if kind != "package":  # which takes a second to read
        monkeypatch.setenv("QFT_CACHE", "off")
        assert facts(*read(path)) == first
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    with quick_gguf():
        config, tokenizer = (kind.from_pretrained(**source) for kind in (AutoConfig, AutoTokenizer))
    theirs = facts(Checkpoint(str(path), path.parent, config, gguf_file=path.name), tokenizer)
    theirs["config"][1].pop("quantization_config", None)
    assert first | {"arguments": None} == theirs | {"arguments": None}


def test_a_file_is_read_once_and_then_not_at_all(
    model_file: Path, kept_in: Path, read: Read, readings: list[str]
) -> None:
    read(model_file)
    assert readings == ["m.gguf"]
    read(model_file)
    assert readings == ["m.gguf"]
    shutil.copy(model_file, model_file.with_name("copy.gguf"))
    checkpoint, tokenizer = read(model_file.with_name("copy.gguf"))
    assert readings == ["m.gguf"]
    assert checkpoint.config.name_or_path == tokenizer.name_or_path == str(model_file.parent)
    assert dequantized(checkpoint, tiny_llama().dtype).get_input_embeddings().weight.shape == (264, 64)
    assert readings == ["m.gguf", "copy.gguf"]


def test_a_changed_file_of_the_same_size_and_time_is_read_anew(model_file: Path, kept_in: Path, read: Read) -> None:
    _, before = read(model_file)
    times, content = model_file.stat(), model_file.read_bytes()
    assert content.count(b"add_generation_prompt") == 1
    model_file.write_bytes(content.replace(b"add_generation_prompt", b"add_generation_PROMPT"))
    os.utime(model_file, ns=(times.st_atime_ns, times.st_mtime_ns))
    _, after = read(model_file)
    assert after.chat_template == before.chat_template.replace("add_generation_prompt", "add_generation_PROMPT")


def test_what_lies_beside_the_file_counts(model_file: Path, tiny_model: Path, kept_in: Path, read: Read) -> None:
    assert "<|bos|>" in read(model_file)[1].get_vocab()
    for name in ("<|one|>", "<|two|>"):
        text = (tiny_model / "tokenizer.json").read_text("utf-8").replace("<|bos|>", name)
        (model_file.parent / "tokenizer.json").write_text(text, encoding="utf-8")
        assert [name in read(model_file)[1].get_vocab() for _ in range(2)] == [True, True]


def damage(entry: Path) -> None:
    for file in entry.glob("*.json"):
        file.write_bytes(file.read_bytes()[:-20])


def falsify(entry: Path) -> None:
    for file in entry.glob("tokenizer.json"):
        file.write_text(file.read_text().replace("<|im_end|>", "<|im_END|>"))
    for file in entry.glob("config.json"):
        file.write_text(file.read_text().replace("128", "256"))


@pytest.mark.parametrize("harm", [damage, falsify, shutil.rmtree])
def test_a_broken_entry_is_made_anew(
    harm: Callable[[Path], None], model_file: Path, kept_in: Path, read: Read, readings: list[str]
) -> None:
    first = facts(*read(model_file))
    whole = {file: file.read_bytes() for file in kept_in.rglob("*.json")}
    for entry in list(kept_in.iterdir()):
        harm(entry)
    assert {file: file.read_bytes() for file in kept_in.rglob("*.json")} != whole
    assert facts(*read(model_file)) == first
    assert {file: file.read_bytes() for file in kept_in.rglob("*.json")} == whole
    assert readings == ["m.gguf"] * 2


def test_entries_that_are_not_used_make_room(
    tmp_path: Path, model_file: Path, kept_in: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names() -> set[str]:
        return {entry.name for entry in kept_in.iterdir()}

    read(model_file)
    first = names()
    used = sum(file.stat().st_size for file in kept_in.rglob("*.json"))
    read(sentencepiece(tmp_path / "models" / "g.gguf"))
    second = names() - first
    for at, entry in enumerate(second):
        os.utime(kept_in / entry, (at, at))
    read(model_file)  # is used again, and so stays
    monkeypatch.setattr(cache, "MAX_BYTES", 2 * used)
    third = tmp_path / "models" / "third.gguf"
    third.write_bytes(model_file.read_bytes().replace(b"add_generation_prompt", b"add_generation_PROMPT"))
    read(third)
    assert first < names()
    assert not second & names()
    assert len(names()) == 4
    assert sum(file.stat().st_size for file in kept_in.rglob("*.json")) <= 2 * used


def test_nothing_is_kept_where_it_is_off_or_cannot_be(
    tmp_path: Path, model_file: Path, read: Read, readings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("QFT_CACHE", "off")
    read(model_file)
    assert not (tmp_path / "xdg").exists()
    monkeypatch.setenv("QFT_CACHE", str(model_file / "below"))
    read(model_file)
    assert readings == ["m.gguf"] * 2
    monkeypatch.delenv("QFT_CACHE")
    read(model_file)
    read(model_file)
    assert readings == ["m.gguf"] * 3
    assert len(list((tmp_path / "xdg" / "qft" / "gguf").iterdir())) == 2
