"""Inputs of checkpointed blocks, which wait in the host's memory until the backward pass comes to them.

Each is copied away while the next block is computed, and brought back while the next is computed again: on the device
are two or three at a time."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer

LEAST = 2**20
"""Bytes from which a tensor is worth a copy."""


class _Kept:
    """One input: on the device, on its way, or on the host."""

    def __init__(self, tensor: torch.Tensor, previous: _Kept | None) -> None:
        self.tensor: torch.Tensor | None = tensor
        self.shape, self.dtype, self.away = tensor.shape, tensor.dtype, False
        self.host: torch.Tensor | None = None
        self.ready: Any = None
        """Event behind the copy to the device; None: it never left."""
        self.previous = weakref.ref(previous) if previous else lambda: None


class Stash:
    """Keeps block inputs on the host, in page-locked memory that is used again and again. Of tensors without contents,
    what would be on the device is there."""

    def __init__(self, device: torch.device) -> None:
        self._side: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._free: defaultdict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = defaultdict(list)
        self._last: Callable[[], _Kept | None] = lambda: None

    def pack(self, tensor: torch.Tensor) -> Any:
        """For saved_tensors_hooks."""
        if tensor.nbytes < LEAST or not (tensor.is_cuda or isinstance(tensor, FakeTensor)):
            return tensor
        before = self._last()
        kept = _Kept(tensor.detach(), before)
        self._last = weakref.ref(kept)
        if before and before.tensor is not None and not before.away:
            self._put_away(before, before.tensor)
        return kept

    def unpack(self, kept: Any) -> torch.Tensor:
        """For saved_tensors_hooks."""
        if isinstance(kept, torch.Tensor):
            return kept
        self._bring(kept)
        if before := kept.previous():
            self._bring(before)
        if kept.ready is not None:
            torch.cuda.current_stream().wait_event(kept.ready)
        tensor: torch.Tensor = kept.tensor
        if kept.away:
            kept.tensor = None
        return tensor

    def _put_away(self, kept: _Kept, tensor: torch.Tensor) -> None:
        kept.away, kept.tensor = True, None
        if not tensor.is_cuda:
            return
        kept.host = self._place(tensor)
        weakref.finalize(kept, self._free[tensor.shape, tensor.dtype].append, kept.host)
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            kept.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._side)

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        free = self._free[tensor.shape, tensor.dtype]
        made: torch.Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) if not free else free.pop()
        return made

    def _bring(self, kept: _Kept) -> None:
        if kept.tensor is not None or not kept.away:
            return
        if kept.host is None:
            kept.tensor = torch.empty(kept.shape, dtype=kept.dtype)
            return
        kept.tensor = torch.empty(kept.shape, dtype=kept.dtype, device=self._side.device)
        self._side.wait_stream(torch.cuda.current_stream())  # whoever had that memory before
        with torch.cuda.stream(self._side):
            kept.tensor.copy_(kept.host, non_blocking=True)
            kept.ready = self._side.record_event()
        kept.tensor.record_stream(self._side)


def stash_inputs(model: nn.Module, device: torch.device) -> Stash:
    """Have the inputs of all blocks for which checkpointing is enabled wait on the host, where others may wait, too."""
    stash = Stash(device)

    def stashed(checkpoint: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(stash.pack, stash.unpack):  # within, checkpointing has hooks of its own
            return checkpoint(*args, **kwargs)

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module._gradient_checkpointing_func = partial(stashed, module._gradient_checkpointing_func)
    return stash
