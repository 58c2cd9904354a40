"""A packed weight that is used as another than was loaded is found, by its layer's name."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from qft.distributed.gate import BitGate, checksum
from qft.distributed.world import Ranks, World
from qft.errors import ModelError
from qft.model.sharded import own_part


def layers() -> Any:
    torch.manual_seed(0)
    made = [bnb.nn.Linear4bit(64, 64, bias=False, quant_storage=torch.bfloat16, quant_type="nf4") for _ in range(3)]
    return nn.Sequential(*made).to("cpu")


def test_one_changed_byte_is_found_once_it_is_used() -> None:
    model = layers()
    gate = BitGate()
    gate.note(model)
    gate.arm()
    packed = model[1].weight.data.view(torch.uint8)
    packed.view(-1)[1234] ^= 1
    x = torch.ones(1, 64)
    model[0](x)
    gate.require()
    assert gate.seen == 1
    model(x)
    assert (gate.seen, gate.changed) == (3, ["1"])
    with pytest.raises(ModelError, match=r"^1: its packed 4-bit weights came out .*distributed.strategy to ddp"):
        gate.require()


def test_a_weight_that_is_not_whole_is_found() -> None:
    model = layers()
    gate = BitGate()
    gate.note(model)
    gate.arm()
    hook = gate.layers["2"]._forward_pre_hooks
    gate.layers["2"].weight.data = gate.layers["2"].weight.data[:7]
    next(iter(hook.values()))(gate.layers["2"], ())
    assert gate.changed == ["2"]


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_process_keeps_its_part_alone(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, found = torch.randn(rows, 3), []
    for rank in range(4):
        monkeypatch.setattr("qft.model.sharded.world", lambda rank=rank: World(Ranks(rank, 4)))
        monkeypatch.setattr("torch.empty", lambda shape, dtype: torch.zeros(shape, dtype=dtype))
        found.append(own_part(whole))
    assert torch.equal(sum(found[1:], found[0]), whole)
    assert all(part.any(1).sum() <= -(-rows // 4) for part in found)


@pytest.mark.parametrize("size", [1, 3, 4, 1001])
def test_a_checksum_is_of_every_byte_and_its_place(size: int) -> None:
    data = torch.arange(size, dtype=torch.int64).to(torch.uint8)
    sums = {tuple(checksum(data).tolist())}
    for place in range(size):
        other = data.clone()
        other[place] ^= 0x80
        sums.add(tuple(checksum(other).tolist()))
    assert len(sums) == size + 1
    assert torch.equal(checksum(data.flip(0)), checksum(data)) == (size == 1)
