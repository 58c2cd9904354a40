"""Experts that no calibration window reaches are named."""

from __future__ import annotations

import torch

from qft.calibration.reached import watch_experts
from qft.quant.experts import expert_parameters, owner
from tests.support.mixtures import mixture


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
