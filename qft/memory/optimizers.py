"""What each optimizer keeps for a parameter on the device that trains, and what a step of it takes besides."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from qft.memory.ledger import in_granules

SMALL = 4096
"""Parameters of fewer numbers keep 32-bit moments with bitsandbytes' 8-bit optimizers (min_8bit_size)."""
PAGED = 100_000
"""Moments of fewer numbers stay on the device with its paged ones (Optimizer2State.get_state_buffer)."""
BLOCK = 256
"""8-bit moments that share a float32 scale."""


def _moments(count: int, *, bits: int = 32, paged: bool = False) -> Callable[[torch.Size], list[int]]:
    def of(shape: torch.Size) -> list[int]:
        numbers = shape.numel()
        if paged and numbers >= PAGED:
            return []
        if bits == 8 and numbers >= SMALL:
            return [numbers, 4 * -(-numbers // BLOCK)] * count
        return [4 * numbers] * count

    return of


def _factored(shape: torch.Size) -> list[int]:
    return [4 * shape[:-1].numel(), 4 * (shape[:-2].numel() * shape[-1])] if len(shape) > 1 else [4 * shape.numel()]


STATES: dict[str, Callable[[torch.Size], list[int]]] = {
    "adamw_torch": _moments(2),
    "adamw_torch_fused": _moments(2),
    "adamw_8bit": _moments(2, bits=8),
    "paged_adamw_8bit": _moments(2, bits=8, paged=True),
    "paged_adamw_32bit": _moments(2, paged=True),
    "lion_8bit": _moments(1, bits=8),
    "lion_32bit": _moments(1),
    "adafactor": _factored,
    "sgd": lambda shape: [],
}
"""By train.optim: bytes of each tensor that is kept for a parameter of that shape."""


def state_bytes(optim: str, shapes: Sequence[torch.Size]) -> int:
    """What is kept for parameters of those shapes, as an allocator has it."""
    return sum(in_granules(size) for shape in shapes for size in STATES[optim](shape))


def step_bytes(optim: str, shapes: Sequence[torch.Size], *, on_gpu: bool) -> int:
    """What an update takes at its worst moment: torch's own AdamW makes the denominators of all parameters at once on a
    GPU, others those of one."""
    sizes = [4 * shape.numel() for shape in shapes]
    if optim == "adamw_torch":
        return sum(sizes) if on_gpu else 2 * max(sizes)
    return 3 * max(sizes) if optim == "adafactor" else 0
