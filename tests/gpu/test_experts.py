"""Experts in few bits on a CUDA device: held as on a CPU, foretold, and trained to what their merge is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qft.model.adapter import with_adapter
from qft.model.load import load_base
from qft.model.merge import MergedWeights
from qft.plan import plan_model
from qft.recipe import load
from qft.recipe.load import from_values
from tests.support.mixtures import write_mixture
from tests.support.runs import MODES, trained

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", ["nf4", "fp4", "8bit"])
def test_experts_are_held_as_on_a_cpu(mode: str, tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "model", "qwen3_moe")
    values = {"quant": MODES[mode]["quant"], "data": {"train": "-"}, "output_dir": "-"}
    held = []
    for device in ("cpu", "cuda"):
        plan = plan_model(from_values(values | {"model": {"path": str(folder), "device": device}}))
        model = load_base(plan)
        names = sorted(plan.scheme.holds_experts(plan.skeleton))
        held.append([model.get_parameter(name).view_of.whole().float().cpu() for name in names])
    for here, there in zip(*held, strict=True):
        torch.testing.assert_close(here, there, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_the_merged_model_is_what_was_trained(kind: str, tmp_path: Path) -> None:
    base = write_mixture(tmp_path / "model", kind)
    run = trained(
        tmp_path,
        base,
        model={"device": "cuda"},
        adapter={"r": 4, "target_experts": True},
        train={"max_steps": 6, "gradient_checkpointing": True},
    )
    plan = plan_model(load(run / "recipe.yaml"))
    adapted = with_adapter(load_base(plan), run / "adapter")
    MergedWeights(plan, run / "adapter", "bfloat16", "dequantized").write(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16, device_map="cuda")
    ids = torch.randint(3, 260, (2, 24), device="cuda")
    with torch.no_grad():
        meant, made = (model(ids).logits.float() for model in (adapted, merged))
    # Routers choose between scores that differ by less than bfloat16 rounds: some tokens go elsewhere.
    assert ((made - meant).abs().mean() / meant.abs().mean()).item() < 0.1
