"""Weights that FSDP2 shards: how, and how those that are trained come together again. The frozen ones never do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor


def plugin_arguments(blocks: nn.ModuleList) -> dict[str, Any]:
    """Of accelerate's FullyShardedDataParallelPlugin, for a model of these blocks, each of which is a unit.

    No dtype for parameters: where one is given, packed 4-bit weights are gathered as numbers of it, and bytes that look
    like a NaN come out as others. Gradients are summed in float32."""
    return {
        "fsdp_version": 2,
        "auto_wrap_policy": "transformer_based_wrap",
        "transformer_cls_names_to_wrap": sorted({type(block).__name__ for block in blocks}),
        "reshard_after_forward": True,
        "state_dict_type": "SHARDED_STATE_DICT",
        "cpu_ram_efficient_loading": False,
        "mixed_precision_policy": MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32),
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which each process has a part; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What of a model is trained, by name."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained weights, whole, on the host. Every process must ask."""
    return {name: whole(p.detach()).cpu() for name, p in trained(model)}


@torch.no_grad()
def scatter(tensors: Mapping[str, torch.Tensor], model: nn.Module) -> list[str]:
    """Put whole tensors into the model, to each process its part. Returns the names of those that it lacks, or has and
    are not there."""
    own = dict(trained(model))
    for name in own.keys() & tensors.keys():
        p = own[name]
        local = p.to_local() if isinstance(p, DTensor) else p
        local.copy_(part_of(tensors[name], p))
    return sorted(own.keys() ^ tensors.keys())


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What of a whole tensor this process has, if it is divided as `like`."""
    placed = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return placed
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None).to_local()


def gathered_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state as one process alone would have it. Every process must ask."""
    state = optimizer.state_dict()
    found = {
        number: {name: whole(v).cpu() if isinstance(v, torch.Tensor) else v for name, v in each.items()}
        for number, each in state["state"].items()
    }
    return {**state, "state": found}


def scattered_state(state: dict[str, Any], parameters: Iterable[torch.Tensor]) -> dict[str, Any]:
    """The state of one process, divided as the parameters are, which come in the order of its numbers."""
    found = {}
    for number, p in enumerate(parameters):
        found[number] = {name: _divided(value, p) for name, value in state["state"].get(number, {}).items()}
    return {**state, "state": found}


def _divided(value: Any, like: torch.Tensor) -> Any:
    if not isinstance(value, torch.Tensor) or not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
