"""Images and new tokens on a CUDA device: in nf4, with the loss in one pass, kernels and checkpointed blocks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qft.model.merge import MergedWeights
from qft.plan import plan_model
from qft.recipe import load
from tests.support.pictures import draw_script, families, write_seeing_model
from tests.support.runs import run

pytestmark = pytest.mark.gpu


# bitsandbytes' word on rows of 32, which no real model has.
@pytest.mark.filterwarnings("ignore:inner dimension:UserWarning")
@pytest.mark.parametrize("family", families())
def test_a_model_in_4_bits_learns_from_images(family: str, tmp_path: Path) -> None:
    write_seeing_model(tmp_path / "model", family)
    draw_script().write(tmp_path / "shapes", {"What colour is it?": 0})
    train = {"max_steps": 20, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "report_to": []}
    train |= {"learning_rate": 0.02, "save_strategy": "no", "gradient_checkpointing": True}
    values = {
        "model": {"path": str(tmp_path / "model"), "add_tokens": ["<a>", "<b>"]},
        "quant": {"preset": "finetune", "allow_partial": True},
        "adapter": {"r": 8},
        "data": {"train": "shapes/rows.jsonl", "eval_fraction": 0.2},
        "eval": {"metrics": ["exact_match"], "max_new_tokens": 8},
        "train": train,
        "output_dir": "run",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    report = run(tmp_path / "recipe.yaml")
    assert report.eval.before is not None
    assert report.eval.after is not None
    assert math.isfinite(report.eval.after.loss)
    assert report.eval.after.loss < report.eval.before.loss - 0.3
    plan = plan_model(load(tmp_path / "recipe.yaml"))
    merged = MergedWeights(plan, tmp_path / "run/adapter", "bfloat16", "dequantized")
    merged.write(tmp_path / "merged")
    written = {name: t for path in (tmp_path / "merged").glob("*.safetensors") for name, t in load_file(path).items()}
    stored = load_file(tmp_path / "model/model.safetensors")
    same = [name for name, value in stored.items() if value.dtype == written[name].dtype == torch.float32]
    assert len(same) > 10  # what sees, in the dtype of its files
    assert all(torch.equal(written[name], stored[name]) for name in same)
