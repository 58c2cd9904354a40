"""Weights that stay as their files have them on a CUDA device: trained there, foretold, and merged."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

from qft.export import export
from qft.progress import View
from tests.support.exports import options
from tests.support.packed import packed_model
from tests.support.runs import trained

pytestmark = pytest.mark.gpu

LAYOUTS = [
    "gptq", "gptq of 3 bits", "awq", "compressed int4", "compressed int8", "compressed fp8", "compressed mxfp4",
    "compressed nvfp4", "mxfp4", "deepseek_v3:compressed int4", "torchao int8", "torchao int4", "torchao fp8", "hqq",
    "hqq of 3 bits",
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_base_is_trained_and_merged(layout: str, tmp_path: Path) -> None:
    packed_model(tmp_path / "model", layout)
    gc.collect()
    of_others = torch.cuda.memory_allocated()
    train = {"max_steps": 6, "gradient_checkpointing": True}
    run = trained(tmp_path, tmp_path / "model", quant=None, model={"device": "cuda"}, train=train)
    report = json.loads((run / "report.json").read_text())
    assert report["model"]["quantized_share"] > 0.75
    assert report["loss"]["last"] < report["loss"]["first"]
    found, foretold = report["memory"]["peak_gpu_bytes"] - of_others, report["memory"]["predicted_peak_bytes"]
    assert foretold is not None
    assert foretold > 0.8 * found
    merged, *_ = export(run, options("merged"), View())
    assert merged.gate is not None
    assert merged.gate.passed
