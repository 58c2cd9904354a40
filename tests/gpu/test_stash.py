"""Inputs of checkpointed blocks on the host: the same gradients, to the bit, in less of the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qft.memory import stash
from qft.memory.checkpointing import enable_checkpointing
from tests.support.kernels import adapted, gradients
from tests.support.models import tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]


def made() -> Any:
    torch.manual_seed(0)
    model = tiny_llama(num_hidden_layers=6)
    enable_checkpointing(model)
    model.enable_input_require_grads()
    return adapted(model, torch.float32).cuda()


def test_gradients_are_the_same_and_the_device_holds_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stash, "LEAST", 2**16)
    ids, peaks, found = torch.arange(8192, device="cuda").view(16, 512) % 264, [], []
    for stashed in (False, True):
        model = made()
        if stashed:
            stash.stash_inputs(model, torch.device("cuda"))
        for _ in range(3):  # the memory on the host is used again
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            last = gradients(model, ids)
        peaks.append(torch.cuda.max_memory_allocated())
        found.append({name: tensor.cpu() for name, tensor in last.items()})
        del last, model
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert peaks[1] <= peaks[0] - 2 * ids.numel() * 64 * 4


def test_a_host_that_is_far_ahead_takes_no_more_of_the_device() -> None:
    """Memory of inputs that were copied is used again at once, not when the host has seen that they were."""
    kept, size = stash.Stash(torch.device("cuda")), 2**24
    held: list[Any] = []
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for number in range(12):
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]  # some 10 ms
        x = torch.full((size // 4,), float(number), device="cuda")
        held.append(kept.pack(x))
        del x
    sums = []
    for number in reversed(range(12)):
        sums.append((number, kept.unpack(held.pop()).sum()))
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
    assert all(total.item() == number * size // 4 for number, total in sums)
    assert torch.cuda.max_memory_allocated() - before < 3.5 * size
