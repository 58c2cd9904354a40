"""A GGUF file is read as the gguf package reads it, without what that does again and again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from qft.checkpoint.find import find_checkpoint
from qft.checkpoint.quick_gguf import quick_gguf
from qft.checkpoint.weights import dequantized
from qft.gguf.file import write_gguf
from qft.recipe import load
from tests.support.gguf import saved
from tests.support.models import tiny_llama


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    write_gguf(saved(tiny_llama(), tmp_path / "saved"), tmp_path / "m.gguf", kind="f32")
    return tmp_path / "m.gguf"


def test_what_is_read_is_what_gguf_reads(model_file: Path) -> None:
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with quick_gguf():
        found = gguf.GGUFReader(model_file)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
    expected = gguf.GGUFReader(model_file)
    assert {name: field.contents() for name, field in found.fields.items()} == {
        name: field.contents() for name, field in expected.fields.items()
    }
    for ours, theirs in zip(found.tensors, expected.tensors, strict=True):
        assert (ours.name, ours.tensor_type) == (theirs.name, theirs.tensor_type)
        assert np.array_equal(ours.data, theirs.data)


def test_names_are_made_once_for_all_modules(
    model_file: Path, recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, names = list[object](), gguf.get_tensor_name_map

    def make(*asked: Any) -> Any:
        made.append(asked)
        return names(*asked)

    monkeypatch.setattr(gguf, "get_tensor_name_map", make)
    dequantized(find_checkpoint(load(recipe_file(model={"path": str(model_file)})).recipe), torch.float32)
    assert len(made) == 1
