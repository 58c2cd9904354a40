"""A GGUF file as the base of a training is the model that it says, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from qft.checkpoint.find import find_checkpoint
from qft.checkpoint.header import header
from qft.checkpoint.weights import dequantized
from qft.errors import ModelError
from qft.gguf.file import write_gguf
from qft.plan import plan_model
from qft.recipe.load import from_values
from tests.support.gguf import qwen, saved
from tests.support.models import tiny_llama

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
MADE: dict[str, Callable[[], Any]] = {
    "llama3": lambda: tiny_llama(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}, head_dim=64),
    "linear": lambda: tiny_llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "yarn": lambda: qwen("Qwen2", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, **YARN}),
    "heads of their own size": lambda: qwen("Qwen3", head_dim=32),
}


def asked(path: Path) -> Any:
    return from_values({"model": {"path": str(path), "device": "cpu", "dtype": "float32"}, "output_dir": "-"})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(3, 103)[None]).logits
    return found


@pytest.mark.parametrize("kind", MADE)
def test_what_a_file_says_is_what_is_trained(kind: str, tmp_path: Path) -> None:
    model = MADE[kind]()
    write_gguf(saved(model, tmp_path / "saved"), tmp_path / "m.gguf", kind="f32")
    plan = plan_model(asked(tmp_path / "m.gguf"))
    torch.testing.assert_close(logits(dequantized(plan.checkpoint, torch.float32)), logits(model), rtol=1e-4, atol=1e-4)


def rewritten(path: Path, out: Path, more: dict[str, Any], drop: str = "") -> Path:
    """The file with other tensors, and values under other keys."""
    reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(out, "llama")
    tensors = {name: value for name, value in more.items() if isinstance(value, np.ndarray)}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in more:
            kind = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=kind)
    for name in more.keys() - tensors.keys():
        kind = gguf.GGUFValueType.STRING if isinstance(more[name], str) else gguf.GGUFValueType.FLOAT32
        writer.add_key_value(name, more[name], kind)
    for tensor in reader.tensors:
        if tensor.name not in {drop, *tensors}:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    write_gguf(saved(tiny_llama(), folder / "saved"), folder / "m.gguf", kind="f32")
    return folder / "m.gguf"


BIAS = {"blk.0.attn_q.bias": np.ones(64, np.float32)}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a bias": (BIAS, r"unexpected: blk\.0\.attn_q\.bias"),
    "a scaling": ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "longrope"),
    "two lengths": ({"rope_factors_long.weight": np.ones(8, np.float32)}, "rope_factors_long"),
    "frequencies": ({"rope_freqs.weight": np.array([1, 3, 2, 7, 1, 1, 1, 9], np.float32)}, "none of the rules"),
    "no weight": ({"drop": "blk.1.ffn_up.weight"}, r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_would_be_left_out_is_refused_before_anything_is_loaded(what: str, plain: Path, tmp_path: Path) -> None:
    changes, message = WRONG[what]
    drop = str(changes.get("drop", ""))
    with pytest.raises(ModelError, match=message):
        plan_model(asked(rewritten(plain, tmp_path / "m.gguf", {} if drop else changes, drop)))


def test_a_tensor_can_be_left_out_where_it_is_meant(plain: Path, tmp_path: Path) -> None:
    path = rewritten(plain, tmp_path / "m.gguf", BIAS)
    model = {"path": str(path), "device": "cpu", "ignore_unexpected": [r"attn_q\.bias"]}
    assert plan_model(from_values({"model": model, "output_dir": "-"})).shape.layers


def test_a_header_is_read_whole(plain: Path) -> None:
    found, reader = header(plain), gguf.GGUFReader(plain)
    assert {name: list(shape) for name, shape in found.shapes.items()} == {
        tensor.name: [*map(int, tensor.shape[::-1])] for tensor in reader.tensors
    }
    single = {name: field.contents() for name, field in reader.fields.items() if len(field.types) == 1}
    assert found.values == {name: value for name, value in single.items() if not name.startswith("GGUF.")}
    assert (
        find_checkpoint(asked(plain).recipe).config.rope_parameters["rope_theta"]
        == found.values["llama.rope.freq_base"]
    )
