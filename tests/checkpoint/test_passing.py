"""Models whose blocks can be run one at a time, and those whose cannot: of both, without contents."""

from __future__ import annotations

import pytest

from qft.checkpoint.passing import passing_problem
from qft.checkpoint.skeleton import find_blocks
from tests.support.tiny import tiny_skeleton

PROBLEMS = {
    "llama": None,
    "bamba": None,  # whose blocks return attention's weights beside
    "longcat_flash": None,  # whose blocks are called by names alone
    "glm_moe_dsa": "are given more of those before than hidden states",
}


@pytest.mark.parametrize("kind", PROBLEMS)
def test_what_blocks_need_of_one_another_is_told(kind: str) -> None:
    model = tiny_skeleton(kind)
    _, blocks = find_blocks(model, model.config.num_hidden_layers)
    problem = passing_problem(model, blocks)
    assert (problem is None) is (PROBLEMS[kind] is None)
    assert (PROBLEMS[kind] or "") in (problem or "")
    assert not any("forward" in vars(block) for block in blocks)
