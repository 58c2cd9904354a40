"""Experts that no calibration window reaches are named."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from qft.calibration.reached import watch_experts
from qft.quant.experts import expert_parameters, owner
from tests.support.calibrations import calibrated
from tests.support.mixtures import mixture, write_mixture
from tests.support.rows import chat, write_jsonl


def test_experts_that_see_no_token_are_named() -> None:
    model = mixture("qwen3_moe")
    experts = {owner(name): stack.shape[0] for name, stack in expert_parameters(model).items()}
    with torch.no_grad(), watch_experts(model, experts) as missed:
        assert missed() == []
        model(torch.arange(3, 83).view(1, 80))
        assert missed() == []
    with torch.no_grad(), watch_experts(model, experts) as missed:
        model.model.layers[0].mlp.gate.weight.zero_()  # all tokens go to the same two
        model(torch.arange(3, 83).view(1, 80))
    [told] = missed()
    assert told.startswith("model.layers.0.mlp.experts: no window reaches experts ")
    assert told.endswith(" (of 4)")
    assert told.count(",") == 1


def test_autoround_leaves_experts_as_they_are_and_rounds_what_it_skips(tmp_path: Path) -> None:
    """One of DeepSeek's layers has 48 outputs, and auto-round wants multiples of 32."""
    write_mixture(tmp_path / "model", "deepseek_v3")
    write_jsonl(tmp_path / "rows.jsonl", [chat(f"say {number}", "it") for number in range(12)])
    calibrate = {"engine": "autoround", "iters": 0, "allow_partial": True, "group_size": 32}
    recipe = {"model": {"path": str(tmp_path / "model"), "device": "cpu"}, "calibrate": calibrate, "output_dir": "out"}
    recipe |= {"data": {"train": "rows.jsonl", "eval_fraction": 0.2, "max_length": 64}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    report = calibrated(tmp_path / "recipe.yaml")
    written = {name for path in Path(str(report.result)).glob("*.safetensors") for name in load_file(path)}
    assert "model.layers.1.self_attn.kv_a_proj_with_mqa.weight_packed" in written
    assert {"model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"} <= written
    assert report.attempts[-1].kl_mean < 0.01
