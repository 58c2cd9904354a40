"""What is left of small numbers that are added to large ones in 16 bits."""

import torch


def assert_small_steps_kept(made: torch.Tensor, base: torch.Tensor, added: torch.Tensor) -> None:
    """Of `made`, in bfloat16, which stands for base + added, in float64. What is added is far less than the last bit of
    what it is added to: no one sum tells of it, and the average of many does."""
    assert float((added / base).abs().median()) < 2**-9
    kept = float(((made.double() - base) * added).sum() / added.square().sum())
    assert 0.9 < kept < 1.1
