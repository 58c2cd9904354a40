"""A base of which a process is to keep a part: each block is held as the scheme says by the device, and put away but
for that part before the next one is read, so that the base is whole nowhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from qft.distributed.world import world
from qft.model.by_block import load_by_block
from qft.model.load import load_base
from qft.plan import ModelPlan
from qft.plan.sharding import loads_by_block


def load_for_sharding(plan: ModelPlan, look: Callable[[nn.Module, str], None]) -> PreTrainedModel:
    """`load_base`, the blocks on the host, and of their weights only what FSDP2 will keep; `look` sees each block, by
    its name, while it is whole. A checkpoint that comes quantized is loaded whole."""
    return load_base(plan, partial(_by_block, look=look) if loads_by_block(plan) else None)


def _by_block(plan: ModelPlan, look: Callable[[nn.Module, str], None]) -> PreTrainedModel:
    def take(block: nn.Module, name: str) -> None:
        look(block, name)
        for weight in block.parameters():
            if weight.is_floating_point():  # as all are that FSDP2 shards
                weight.data = own_part(weight.data)

    device = torch.device("cuda", torch.cuda.current_device()) if plan.device.kind == "cuda" else "cpu"
    return load_by_block(plan, str(device), take)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of that shape on the host, in which only this process's part along the first dimension was written: the
    rest of its memory is never touched, and so not taken."""
    found = torch.empty(tensor.shape, dtype=tensor.dtype)
    own, place = (each.chunk(world().size)[world().rank : world().rank + 1] for each in (tensor, found))
    if own:  # a short one has fewer parts than there are processes
        place[0].copy_(own[0])
    return found
