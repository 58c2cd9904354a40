"""The tokenizer that a GGUF file describes, made for an older transformers: what a newer one makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import integrations
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qft.checkpoint.gguf_file import gguf_config
from qft.checkpoint.gguf_tokens import converted, described
from qft.errors import ModelError

PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *map(chr, range(33, 127)), "▁", "He", "ll",
          "Hell", "Hello", "  ", "<think>", "<|im_end|>"]  # fmt: skip
LETTERS = ["<|im_start|>", "<|im_end|>", "<|odd one|>", *sorted(bytes_to_unicode().values()), "He", "ll", "Hell", "é",
           "<think>", "Ġthe"]  # fmt: skip
BLANKS = ["<pad>", "</s>", "<unk>", "▁", *"Helo", "▁Hello", *(f"[PAD{i}]" for i in range(103))]
TEXT = "<|im_start|>Hello  there, 12345: äöü <think>DON'T don't<|im_end|>"


def written(path: Path, architecture: str, kind: str, tokens: list[str], **more: Any) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    whole = {"<think>": gguf.TokenType.USER_DEFINED}
    control = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|odd one|>")
    types = [
        whole.get(token, gguf.TokenType.CONTROL if token in control else gguf.TokenType.NORMAL) for token in tokens
    ]
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if "merges" in more:
        writer.add_token_merges(more["merges"])
    if "pre" in more:
        writer.add_tokenizer_pre(more["pre"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "kind", "tokens", "more"),
    [
        *(("llama", "gpt2", LETTERS, {"merges": ["H e", "l l", "He ll"], "pre": pre})
          for pre in ("gpt-2", "llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o")),
        ("llama", "gpt2", LETTERS, {"merges": ["H e"]}),
        ("llama", "gpt2", LETTERS, {}),
        *((name, "llama", PIECES, {}) for name in ("llama", "phi3", "gemma3")),
        ("llama", "llama", PIECES, {"merges": ["l l", "H e"]}),
        ("gemma4", "gemma4", PIECES, {"merges": ["l l", "H e"]}),
        ("t5", "t5", BLANKS, {}),
    ],
)  # fmt: skip
def test_an_older_transformers_makes_what_a_newer_one_makes(
    architecture: str, kind: str, tokens: list[str], more: dict[str, Any], tmp_path: Path
) -> None:
    if not hasattr(integrations.gguf, "convert_gguf_tokenizer"):
        pytest.skip("transformers is the older one")
    path = str(written(tmp_path / "m.gguf", architecture, kind, tokens, **more))
    name, parts, arguments = integrations.gguf.get_gguf_tokenizer(path)
    theirs, _ = integrations.gguf.convert_gguf_tokenizer(name, parts)
    mine = described(path)
    backend, _ = converted(*mine[:2])
    assert (mine[0], mine[2]) == (name, arguments)
    assert backend.to_str() == theirs.to_str()
    assert backend.encode(TEXT).ids == theirs.encode(TEXT).ids


def test_an_architecture_that_is_not_read_is_told_with_what_reads_it(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf", "command-r", "gpt2", LETTERS)
    with pytest.raises(ModelError, match=r"transformers 5.*command-r.*a newer one may"):
        gguf_config(path)


def test_a_kind_that_is_not_known_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf", "llama", "rwkv", LETTERS)
    with pytest.raises(ValueError, match="'rwkv' is not known"):
        converted(*described(str(path))[:2])
