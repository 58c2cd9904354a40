"""Whether two models favour one token."""

from __future__ import annotations

import pytest
import torch

from qft.measure.likelihood import favour_one


@pytest.mark.parametrize(
    ("reference", "model", "step", "one"),
    [
        ([3.0, 2.0, 1.0], [2.5, 2.4, 0.0], 0.0, True),
        ([3.0, 2.0, 1.0], [2.0, 3.0, 1.0], 0.01, False),
        ([3.0, 3.0, 1.0], [2.0, 3.0, 1.0], 0.0, True),  # the reference has no favourite of the two
        ([3.0, 2.0, 1.0], [3.0, 3.0, 1.0], 0.0, True),
        ([3.0, 2.99, 1.0], [2.0, 3.0, 1.0], 0.0156, True),  # bfloat16 does not tell them apart
        ([3.0, 2.97, 1.0], [2.0, 3.0, 1.0], 0.0156, False),
    ],
)
def test_tokens_that_tie_are_no_disagreement(
    reference: list[float], model: list[float], step: float, one: bool
) -> None:
    found = favour_one(torch.tensor([reference]), torch.tensor([model]), torch.tensor([step]))
    assert found.tolist() == [one]
