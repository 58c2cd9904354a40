"""A Trainer whose model is sharded before anything runs: what is looked at, evaluated and trained is never whole."""

from __future__ import annotations

from typing import Any

from accelerate.utils import FullyShardedDataParallelPlugin  # type: ignore[import-untyped]
from accelerate.utils.fsdp_utils import fsdp2_prepare_model  # type: ignore[import-untyped]
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer


def shard(trainer: Trainer) -> None:
    """As accelerate does when the training begins, which it then leaves to this."""
    accelerator, model = trainer.accelerator, trainer.model
    if not trainer.is_fsdp_enabled:  # on a CPU accelerate forgets it
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    fsdp2_prepare_model(accelerator, model)
    accelerator._models.append(model)
    prepare = accelerator.prepare

    def prepared(*objects: Any, **options: Any) -> Any:
        if not any(each is model for each in objects):
            return prepare(*objects, **options)
        return tuple(each if each is model else accelerator.prepare_optimizer(each) for each in objects)

    accelerator.prepare = prepared


def reshard(model: nn.Module) -> None:
    """Give back what a forward pass without a backward pass has left whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
