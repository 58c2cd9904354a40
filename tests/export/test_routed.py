"""A mixture is compared with the experts that the trained model chose, and is to choose nearly the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qft.export.gate.routed import Choices
from tests.support.mixtures import mixture

IDS = torch.arange(3, 83).view(2, 40)


@pytest.mark.parametrize("kind", ["glm4_moe", "qwen3_moe"])
def test_pinned_experts_take_ties_out_of_a_comparison_and_tell_of_them(kind: str) -> None:
    meant, other = mixture(kind), mixture(kind)
    choices = Choices()
    with torch.no_grad(), choices.noted(meant):
        expected = [meant(ids[None]).logits for ids in IDS]
    assert sum(map(len, choices.given.values())) == 2 * len(choices.given) > 0
    found, same = followed(choices, other)
    assert same == 1
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    for name, weight in other.named_parameters():
        if name.endswith("gate.weight"):
            weight.data += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    found, same = followed(choices, other)
    assert 0.6 < same < 1
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(other(IDS[:1]).logits, expected[0], rtol=1e-2, atol=1e-3)


def followed(choices: Choices, model: Any) -> tuple[list[torch.Tensor], float]:
    with torch.no_grad(), choices.followed(model) as same:
        return [model(ids[None]).logits for ids in IDS], same()
