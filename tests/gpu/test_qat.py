"""Quantization-aware training on a CUDA device: what is trained there is what is written there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qft.export import export
from qft.progress import View
from qft.quant.rounding import TARGETS, Integer
from tests.support.exports import options
from tests.support.runs import trained

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if name != "nf4"])
def test_a_weight_is_rounded_as_on_a_cpu(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = (torch.randn(64, 768) * torch.logspace(-4, 2, 64)[:, None]).to(dtype)
        here, there = (TARGETS[name].rounding(each) for each in (weight, weight.cuda()))
        assert torch.equal(here.values, there.values.cpu())
        assert (here.inside is None) == (there.inside is None)
        if here.inside is not None and there.inside is not None:
            assert torch.equal(here.inside, there.inside.cpu())


def test_learnt_scales_and_their_gradients_are_those_of_a_cpu() -> None:
    rounding = TARGETS["int4-g32"].rounding
    assert isinstance(rounding, Integer)
    weight, upstream = torch.randn(64, 256), torch.randn(64, 256)
    scale, found = rounding.scales(weight) * 0.8, []
    for device in ("cpu", "cuda"):
        parts = [part.to(device).requires_grad_() for part in (weight, scale)]
        values = rounding.learnt(parts[0], parts[1])
        found.append([values, *torch.autograd.grad(values, parts, upstream.to(device))])
    assert torch.equal(found[0][0], found[1][0].cpu())
    assert torch.equal(found[0][1], found[1][1].cpu())
    torch.testing.assert_close(found[0][2], found[1][2].cpu())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("target", ["int4-g32", "w8a8", "w8a8-static", "nvfp4", "nf4", "q4_0"])
def test_what_is_written_is_what_was_trained(
    target: str, checkpointing: bool, tiny_model: Path, tmp_path: Path
) -> None:
    """In bfloat16 with TensorFloat-32 for other products, as a GPU has it without being asked."""
    if TARGETS[target].layer is None:
        pytest.importorskip("cyllama", reason="needs llama.cpp (pip install 'qft[llamacpp]')")
    run = trained(
        tmp_path,
        tiny_model,
        model={"device": "cuda"},
        quant={"mode": "qat", "target": target, "learn_scales": target == "w8a8-static"},
        train={"max_steps": 8, "learning_rate": 1e-2, "gradient_checkpointing": checkpointing},
    )
    [document] = export(run, options(TARGETS[target].form), View())
    assert document.passed
    assert next(check.value for check in document.gate.checks if check.name == "different_weights") == 0
