"""Where the frozen tensors of blocks wait: in page-locked memory of the host, or in files."""

from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from qft.checkpoint.weights import open_tensors, save_tensors
from qft.disk import disk_failures

ALIGNED = 256
"""Bytes at whose multiples a tensor begins, as the allocator of a GPU has it."""


class Layout(NamedTuple):
    """Where each tensor of a block lies in a buffer of bytes."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    offsets: tuple[int, ...]
    size: int
    """Of the buffer, in bytes."""

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, torch.Tensor]]) -> "Layout":
        """One tensor behind the other."""
        names, values = zip(*tensors, strict=True)
        *offsets, size = accumulate((-(-value.nbytes // ALIGNED) * ALIGNED for value in values), initial=0)
        shapes, dtypes = tuple(value.shape for value in values), tuple(value.dtype for value in values)
        return cls(names, shapes, dtypes, tuple(offsets), size)

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors in `buffer`, uint8 of at least `size` bytes, by their names."""
        places = zip(self.names, self.shapes, self.dtypes, self.offsets, strict=True)
        return {
            name: buffer[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for name, shape, dtype, offset in places
        }


class Store(Protocol):
    """Keeps the tensors of blocks, by their numbers."""

    waits: bool
    """Whether `load` takes long, and is to be called by a thread of its own."""

    def put(self, number: int, layout: Layout, tensors: dict[str, torch.Tensor]) -> None: ...

    def load(self, number: int, layout: Layout, staging: torch.Tensor) -> torch.Tensor:
        """The block's bytes on the host, uint8 [layout.size]; `staging`, of at least as many, may be used for them."""
        ...


class HostStore:
    """In the host's memory, page-locked, so that a GPU copies it while it computes."""

    waits = False

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self._buffers: dict[int, torch.Tensor] = {}

    def put(self, number: int, layout: Layout, tensors: dict[str, torch.Tensor]) -> None:
        self._buffers[number] = torch.empty(layout.size, dtype=torch.uint8, pin_memory=self.pinned)
        for name, view in layout.views(self._buffers[number]).items():
            view.copy_(tensors[name])

    def load(self, number: int, layout: Layout, staging: torch.Tensor) -> torch.Tensor:
        return self._buffers[number]


class FileStore:
    """In a safetensors file for each block, mapped into memory while it is read."""

    waits = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, number: int, layout: Layout, tensors: dict[str, torch.Tensor]) -> None:
        plain = {name: tensor.detach().as_subclass(torch.Tensor).cpu() for name, tensor in tensors.items()}
        with disk_failures(self.folder):
            save_tensors(plain, self._path(number), {"kind": "offload"})

    def load(self, number: int, layout: Layout, staging: torch.Tensor) -> torch.Tensor:
        with open_tensors(self._path(number)) as file:
            for name, view in layout.views(staging).items():
                view.copy_(file.get_tensor(name))
        return staging[: layout.size]

    def _path(self, number: int) -> Path:
        return self.folder / f"block-{number:05}.safetensors"
