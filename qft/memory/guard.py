"""An allocator's failure as one message that says what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qft.errors import OutOfMemoryError

__all__ = ["memory_guard"]

SMALLER_TRAINING = (
    "Lower train.per_device_train_batch_size (and raise gradient_accumulation_steps by as much), lower "
    "data.max_length, set train.gradient_checkpointing: true, or hold the base in fewer bits (quant.mode: 4bit)"
)


@contextmanager
def memory_guard(what: str, remedy: str = SMALLER_TRAINING) -> Iterator[None]:
    """Turn an allocator's failure into one message that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)
        if not known and "can't allocate memory" not in str(error):
            raise
        found = str(error).splitlines()[0] if str(error) else "the host has no more"
        raise OutOfMemoryError(f"out of memory while {what}: {found}. {remedy}") from error
