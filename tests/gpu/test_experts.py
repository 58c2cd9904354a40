"""Experts in few bits on a CUDA device: held as on a CPU, foretold, and trained to what their merge is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from qft.model.adapter import with_adapter
from qft.model.load import load_base
from qft.model.merge import MergedWeights
from qft.plan import plan_model
from qft.quant import grouped
from qft.quant.hold import SCHEMES
from qft.quant.product import Factors, View
from qft.quant.stacked import Stacked
from qft.recipe import load
from qft.recipe.load import from_values
from qft.recipe.training import QuantSection
from tests.support.mixtures import write_mixture
from tests.support.runs import MODES, trained

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", ["nf4", "fp4", "8bit"])
def test_experts_are_held_as_near_as_on_a_cpu(mode: str, tmp_path: Path) -> None:
    """Weights of 16 bits lie half way between two numbers of fp4 now and then, and a GPU takes the other one."""
    folder = write_mixture(tmp_path / "model", "qwen3_moe")

    def experts(device: str, quant: dict[str, Any]) -> list[torch.Tensor]:
        values = {"quant": quant, "data": {"train": "-"}, "output_dir": "-"}
        plan = plan_model(from_values(values | {"model": {"path": str(folder), "device": device}}))
        model = load_base(plan)
        held = [model.get_parameter(name) for name in names]
        return [(each.view_of.whole() if isinstance(each, Stacked) else each).float().cpu() for each in held]

    names = [f"model.layers.{block}.mlp.experts.{name}" for block in range(2) for name in ("gate_up_proj", "down_proj")]
    exactly = experts("cpu", {})
    lost = [
        [(own - exact).abs() for own, exact in zip(experts(device, MODES[mode]["quant"]), exactly, strict=True)]
        for device in ("cpu", "cuda")
    ]
    assert all(each.any() for of_device in lost for each in of_device)
    for here, there in zip(*lost, strict=True):
        torch.testing.assert_close(here, there, atol=1e-3, rtol=0)


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


@pytest.mark.parametrize("at_once", [1, 2**20, 2**27])
def test_the_grouped_kernel_comes_to_what_a_loop_does(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert at a time, four, all; the third has no rows."""
    torch.manual_seed(0)
    scheme = SCHEMES["4bit"](QuantSection(mode="4bit"), "bfloat16", ())
    store = scheme.stack(torch.randn(8, 256, 512, device="cuda", dtype=torch.bfloat16))
    sizes = [3, 40, 0, 5, 1, 129, 64, 7]
    ends = torch.tensor(sizes, device="cuda").cumsum(0, dtype=torch.int32)
    shapes = [(8, 256, 8), (8, 8, 512), (sum(sizes), 256)]
    left, right, x = (torch.randn(shape, device="cuda").requires_grad_() for shape in shapes)
    gradient = torch.randn(sum(sizes), 512, device="cuda", dtype=torch.bfloat16)
    monkeypatch.setattr(grouped, "AT_ONCE", at_once)
    found = []
    for kernels in (set[str](), {"cuda"}):
        monkeypatch.setattr(grouped, "KERNELS", kernels)
        weight: Any = Stacked(View(store, torch.bfloat16, None, Factors(left, right, 0.5)))
        made = functional.grouped_mm(x.bfloat16(), weight, offs=ends)
        found.append((made, *torch.autograd.grad(made, (left, right, x), gradient)))
    for loop, kernel in zip(*found, strict=True):
        assert ((kernel - loop).float().norm() / loop.float().norm()).item() < 0.02
