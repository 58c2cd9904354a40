"""A GPU's autocast, and what its kernels take, without a GPU; tests/gpu/test_memory.py asks one."""

from __future__ import annotations

import pytest
import torch

from tests.support.on_gpu import FUNCTIONS, stood_in

SIZE = 2**20
HALF, WIDE = 2 * SIZE, 4 * SIZE
TAKEN: dict[str, tuple[torch.dtype, int]] = {
    "softmax": (torch.float32, 3 * WIDE + WIDE),
    "softmax in 16 bits": (torch.bfloat16, 3 * HALF + HALF),
    "sum": (torch.float32, 0),
    "square": (torch.float32, 2 * WIDE),
    "power": (torch.float32, 2 * WIDE),
    "relu": (torch.bfloat16, 2 * HALF),
}
"""Dtype of the output, and the least bytes at once of both passes beside the input."""


@pytest.mark.parametrize("name", TAKEN)
def test_autocast_and_kernels_of_a_gpu_are_stood_in_for(name: str) -> None:
    dtype, least = TAKEN[name]
    made, peak = stood_in(FUNCTIONS[name], torch.bfloat16, SIZE)
    assert made == dtype
    assert peak >= least + HALF


def test_a_sum_makes_no_copy_and_softmax_of_float16_none_in_float32() -> None:
    assert stood_in(FUNCTIONS["sum"], torch.bfloat16, SIZE)[1] < HALF + WIDE
    from_half, from_brain = (
        stood_in(FUNCTIONS["softmax"], dtype, SIZE)[1] for dtype in (torch.float16, torch.bfloat16)
    )
    assert from_half == from_brain - HALF


@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_autocast_dtypes_stay(name: str) -> None:
    dtype = torch.float32 if name == "softmax asked for in float32" else torch.bfloat16
    assert stood_in(FUNCTIONS[name], torch.bfloat16, 64, mixed=False)[0] == dtype
