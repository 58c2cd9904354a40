"""Checkpoints that come quantized, read as the weights that they mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qft.checkpoint.weights import Weights
from qft.plan import ModelPlan, plan_model
from qft.recipe.load import from_values
from tests.support.mixtures import write_mixture
from tests.support.models import byte_tokenizer, tiny_llama
from tests.support.packed import LAYOUTS, pack, pack_gpt_oss


def planned(folder: Path, **sections: object) -> ModelPlan:
    model = {"path": str(folder), "device": "cpu", "dtype": "float32", "dequantize": True}
    return plan_model(from_values({"model": model, "data": {"train": "-"}, "output_dir": "-", **sections}))


def small(folder: Path) -> Path:
    tiny_llama(hidden_size=64, intermediate_size=96, num_hidden_layers=1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_as_what_it_means(layout: str, tmp_path: Path) -> None:
    meant = pack(small(tmp_path), layout)
    plan = planned(tmp_path)
    read = Weights(plan.checkpoint, plan.skeleton)
    assert len(meant) == 7
    rounded = 4e-3 if layout == "compressed nvfp4" else 1e-5  # the library has its scales in bfloat16
    for name, weight in meant.items():
        torch.testing.assert_close(read(name), weight.float(), rtol=rounded, atol=1e-7)
    assert plan.scheme.name == "none"


def test_experts_of_gpt_oss_are_read_as_what_they_mean(tmp_path: Path) -> None:
    meant = pack_gpt_oss(write_mixture(tmp_path, "gpt_oss"))
    plan = planned(tmp_path, quant={"mode": "4bit"})
    read = Weights(plan.checkpoint, plan.skeleton)
    assert len(meant) == 4
    for name, weight in meant.items():
        assert torch.equal(read(name).float(), weight.float())
    assert plan.held is not None
    assert plan.held.share > 0.9
