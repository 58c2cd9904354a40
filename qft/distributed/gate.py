"""Whether packed weights come out of a gather as they went in: a checksum of each before it is sharded, and in its
first forward pass.

A gather that takes packed codes for numbers rewrites those that look like a NaN, and the loss stays plausible."""

from __future__ import annotations

import time
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from qft.errors import ModelError

CHUNK = 2**22
"""Words that are summed at once."""


def checksum(weight: torch.Tensor) -> torch.Tensor:
    """Of a tensor's bytes, where they are: int64 [2], the sums of its 4-byte words, and of each times its place, modulo
    2^64. One changed word changes the first."""
    data = weight.detach().contiguous().view(-1).view(torch.uint8)
    data = nn.functional.pad(data, (0, -data.numel() % 4)).view(torch.int32)
    total = torch.zeros(2, dtype=torch.int64, device=data.device)
    for start in range(0, len(data), CHUNK):
        words = data[start : start + CHUNK].long()
        places = torch.arange(start + 1, start + 1 + len(words), device=data.device)
        total += torch.stack([words.sum(), (words * places).sum()])
    return total


class BitGate:
    """Watches the packed weights of a model from before they are sharded until each was used once."""

    def __init__(self) -> None:
        self.layers: dict[str, Any] = {}
        self.bytes, self.seconds = 0, 0.0
        """Of weights; and what it has taken."""
        self._wanted: dict[str, tuple[torch.Tensor, int]] = {}
        self._found: dict[str, torch.Tensor] = {}
        self._resized: list[str] = []
        self._hooks: dict[str, Any] = {}

    def note(self, module: nn.Module, name: str = "") -> None:
        """The packed weights in a module of that name, but for those that were noted before."""
        began, known = time.perf_counter(), {id(layer) for layer in self.layers.values()}
        for own, layer in module.named_modules(prefix=name):
            if isinstance(layer, bnb.nn.Linear4bit) and id(layer) not in known:
                self.layers[own], self._wanted[own] = layer, (checksum(layer.weight), layer.weight.nbytes)
                self.bytes += layer.weight.nbytes
        _settle()
        self.seconds += time.perf_counter() - began

    def arm(self) -> None:
        """The weights are sharded: look at each when it is used."""
        self._hooks = {name: m.register_forward_pre_hook(self._look(name)) for name, m in self.layers.items()}

    def _look(self, name: str) -> Any:
        def look(layer: Any, _: Any) -> None:
            began = time.perf_counter()
            weight = layer.weight
            if weight.nbytes != self._wanted[name][1]:
                self._resized.append(name)
            else:
                self._found[name] = checksum(weight)
            self._hooks.pop(name).remove()
            self.seconds += time.perf_counter() - began

        return look

    @property
    def changed(self) -> list[str]:
        """Layers whose weights were others when they were used. Waits for the device."""
        began = time.perf_counter()
        others = [name for name, found in self._found.items() if not torch.equal(found, self._wanted[name][0])]
        self.seconds += time.perf_counter() - began
        return [*self._resized, *others]

    @property
    def seen(self) -> int:
        """Layers that were used."""
        return len(self._found) + len(self._resized)

    def require(self) -> None:
        """Raise ModelError if a weight that was used is not what was loaded."""
        if changed := self.changed:
            more = f" and {len(changed) - 1} others" if len(changed) > 1 else ""
            text = "its packed 4-bit weights came out of the gather of FSDP2 as others than were loaded"
            remedy = "nothing was learnt that could be trusted: set distributed.strategy to ddp"
            raise ModelError(f"{changed[0]}{more}: {text}; {remedy}")


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
