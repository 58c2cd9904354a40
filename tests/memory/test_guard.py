"""What tells that memory ran out, and what was asked for."""

from __future__ import annotations

import pytest
import torch

from qft.memory.guard import asked_bytes, is_out_of_memory

SAID = {
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8 GiB": 5 << 29,
    "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate 96 bytes.": 96,
    "Unable to allocate 7.00 MiB for an array with shape (1, 2)": 7 << 20,
    "CUDA error: out of memory": None,
    "": None,
}


@pytest.mark.parametrize("text", SAID)
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_what_an_allocator_was_asked_for_is_read_from_its_message(text: str, kind: type[Exception]) -> None:
    told = kind is not RuntimeError or "can't allocate" in text or "CUDA error" in text
    assert is_out_of_memory(kind(text)) is told
    assert asked_bytes(kind(text)) == SAID[text]
