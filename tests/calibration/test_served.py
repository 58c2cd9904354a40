"""`calibrate.serve`: nothing is made that the engine is not known to load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qft.calibration.remedy import remedies
from qft.documents.evaluation import LayerError
from qft.errors import RecipeError
from qft.quant.layer import LayerScheme
from qft.recipe import load

FOUR = LayerScheme("int", 4, 32)


def calibrated(folder: Path, **calibrate: Any) -> None:
    values = {"model": {"path": "x"}, "data": {"train": "x.jsonl", "eval": "y.jsonl"}, "output_dir": "run"}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values | {"calibrate": calibrate}))
    load(path)


@pytest.mark.parametrize(
    ("serve", "calibrate", "words"),
    [
        ("vllm-cpu", {"preset": "w8a16"}, ["W8A16 on a CPU", "run, tests/serving", "w4a16 or w8a8-dynamic"]),
        ("vllm-cpu", {"preset": "fp8"}, ["FP8 dynamic on a CPU"]),
        ("vllm-cuda70", {}, ["needs compute capability 8.0", "name another engine"]),
        ("vllm-cuda100", {"preset": "w8a8-dynamic", "engine": "rtn"}, ["from compute capability 10.0", "w8a16 or fp8"]),
        ("vllm-cpu", {"engine": "bitsandbytes", "data_type": "nf4"}, ["does not load bnb-4bit"]),
        ("vllm-cuda80", {"engine": "torchao", "bits": 8}, ["no source is known", "torchao"]),
        ("llama.cpp", {}, ["llama.cpp does not load", "--to gguf-q4_k_m"]),
        ("sglang-cpu", {}, ["no source is known"]),
        ("vllm", {}, ["no engine with its device", "vllm-cuda80"]),
        ("vllm-cuda8", {}, ["no engine with its device"]),
    ],
)
def test_what_the_engine_does_not_load_is_refused_by_field(
    tmp_path: Path, serve: str, calibrate: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        calibrated(tmp_path, serve=serve, **calibrate)
    [line] = [text for text in caught.value.problems if "calibrate.serve: " in text]
    assert f"{tmp_path / 'recipe.yaml'}:" in line
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize(
    ("serve", "calibrate"),
    [
        ("vllm-cpu", {"preset": "w4a16"}),
        ("vllm-cpu", {"preset": "w8a8-dynamic", "engine": "rtn"}),
        ("vllm-cuda75", {"preset": "fp8"}),
        ("vllm-cuda80", {"engine": "bitsandbytes", "data_type": "nf4"}),
        ("sglang-cuda90", {"preset": "w8a16"}),
        ("transformers-cpu", {"symmetric": False}),
    ],
)
def test_what_it_loads_is_made(tmp_path: Path, serve: str, calibrate: dict[str, Any]) -> None:
    calibrated(tmp_path, serve=serve, **calibrate)


@pytest.mark.parametrize(("serve", "bits"), [(None, [8, 16]), ("vllm-cuda80", [8, 16]), ("vllm-cpu", [16])])
def test_the_remedy_raises_layers_to_what_it_loads(serve: str | None, bits: list[int]) -> None:
    errors = [
        LayerError(
            name="o_proj", block=0, kind="o_proj", weight_error=0.1, output_snr_db=9.0, outlier_share=0.0, bytes=512
        )
    ]
    tried = remedies({"o_proj": FOUR}, errors, {"o_proj": 1024}, used=512, limit=None, serve=serve)
    assert [scheme.bits if (scheme := schemes["o_proj"]) else 16 for schemes in tried] == bits
