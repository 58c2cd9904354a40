"""What gradient checkpointing saves and costs, measured on one block of the running model."""

import time
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qft.memory.meter import parts_of, wait_for_device


def enable_checkpointing(model: Any, **arguments: Any) -> None:
    """For all blocks, non-reentrant; `arguments` of torch's checkpoint."""
    # transformers renamed it, and warns of the old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **arguments})


def checkpoint_first(model: nn.Module, count: int) -> None:
    """Of the blocks for which checkpointing was enabled, keep it for the first `count` alone: once they are come to in
    the backward pass, what the later ones kept is free."""
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for block in blocks[count:]:
        block.gradient_checkpointing = False


class CheckpointingProbe:
    """Notes the first input of the first checkpointed block, and measures what it is for."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.inputs: tuple[Any, Any] | None = None
        if self.blocks:
            self._hook = self.blocks[0].register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        if block.training:
            self.inputs = (args, kwargs)
            self._hook.remove()

    def measure(self) -> tuple[int, float]:
        """Bytes that all blocks would keep for the backward pass beside their inputs, and the seconds that computing
        them again takes, for the batch noted; then forgets it. Zeros if no block was run."""
        if self.inputs is None:
            return 0, 0.0
        (args, kwargs), self.inputs = self.inputs, None
        block = self.blocks[0]
        own = (part for tensor in (*block.parameters(), *block.buffers()) for part in parts_of(tensor))
        known = {tensor.untyped_storage().data_ptr() for tensor in own}
        known |= {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        kept: list[int] = []

        def note(tensor: torch.Tensor) -> None:
            """Count it, and keep nothing: for a look, no more memory is taken than by the step."""
            storage: Any = tensor.untyped_storage()
            if storage.data_ptr() not in known and not hasattr(storage, "qft_noted"):
                storage.qft_noted = True  # which an address is not: another may come to it
                kept.append(storage.nbytes())

        was_on, block.gradient_checkpointing = block.gradient_checkpointing, False
        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda nothing: nothing):
                block(*args, **kwargs)
                saved = sum(kept)
                wait_for_device()
                started = time.perf_counter()
                block(*args, **kwargs)
                wait_for_device()
        finally:
            block.gradient_checkpointing = was_on
        return saved * len(self.blocks), (time.perf_counter() - started) * len(self.blocks)
