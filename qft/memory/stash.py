"""Inputs of checkpointed blocks, which wait in the host's memory until the backward pass comes to them.

Each is copied away while its block is computed, and brought back while the one behind it is computed again: on the
device are one or two at a time. The stream that computes waits for a copy before it gives memory back, since what two
streams have used (`record_stream`) is free only once the host has seen it done, and the host is many blocks ahead."""

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
        self.copied: Any = None
        """Event behind the last copy; None: there was none."""
        self.previous = weakref.ref(previous) if previous else lambda: None

    def wait(self) -> None:
        """What is computed from now on comes behind its last copy."""
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)

    def __del__(self) -> None:
        if self.tensor is not None:  # which nobody asked for, and whose memory others may have now
            self.wait()


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
            before.wait()
            before.away, before.tensor = True, None
        if tensor.is_cuda:
            self._copy_away(kept, tensor)
        return kept

    def unpack(self, kept: Any) -> torch.Tensor:
        """For saved_tensors_hooks."""
        if isinstance(kept, torch.Tensor):
            return kept
        self._bring(kept)
        if before := kept.previous():
            self._bring(before)
        kept.wait()
        tensor: torch.Tensor = kept.tensor
        if kept.away:
            kept.tensor = None
        return tensor

    def _copy_away(self, kept: _Kept, tensor: torch.Tensor) -> None:
        kept.host = self._place(tensor)
        weakref.finalize(kept, self._free[tensor.shape, tensor.dtype].append, kept.host)
        self._copy(kept, kept.host, tensor)

    def _copy(self, kept: _Kept, to: torch.Tensor, of: torch.Tensor) -> None:
        self._side.wait_stream(torch.cuda.current_stream())  # for what made `of`, or had the memory of `to` before
        with torch.cuda.stream(self._side):
            to.copy_(of, non_blocking=True)
            kept.copied = self._side.record_event()

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
        self._copy(kept, kept.tensor, kept.host)


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
