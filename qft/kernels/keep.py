"""What a block keeps for its backward pass, and what it makes there again, part by part: outputs of norms are one pass
over memory away from what is kept anyway, gate and up a product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qft.documents.plan import Kept


@dataclass
class Keep:
    """Of one block: asked in each forward pass."""

    norms: bool = True
    """Outputs of norms."""
    gates: bool = True
    """Outputs of gate and up."""
    stash: Any = None
    """Where inputs of norms wait whose outputs are not kept: has pack(tensor) and unpack(what pack gave). None: where
    they are."""


def keep(blocks: Sequence[Keep], kept: Sequence[Kept], stash: Any = None) -> None:
    """Have each block keep what is said of it. Checkpointing is not looked after here, and what a checkpointed block
    makes again, it keeps."""
    for own, what in zip(blocks, kept, strict=True):
        own.norms, own.gates = what in ("inputs", "all"), what != "attention"
        own.stash = None if own.norms else stash


class Source:
    """What an output was made of, in its place."""

    def __init__(self, x: torch.Tensor, make: Callable[[torch.Tensor, int], torch.Tensor], stash: Any) -> None:
        """`make`: from x and the columns of a border."""
        self._make, self._stash = make, stash
        self._held, self._version = stash.pack(x.detach()) if stash else x.detach(), x._version
        self._x: torch.Tensor | None = None

    @property
    def x(self) -> torch.Tensor:
        if self._x is None:
            if self._held is None:
                raise RuntimeError("the input of a norm is gone once its gradient was taken: no second backward pass")
            self._x = self._stash.unpack(self._held) if self._stash else self._held
            if not self._stash and self._x._version != self._version:
                raise RuntimeError("the input of a norm was changed in its place before the backward pass")
        return self._x

    def again(self, border: int) -> torch.Tensor:
        """The output, with so wide a border."""
        return self._make(self.x, border)

    def forget(self) -> None:
        """Nobody will ask any more."""
        self._held = self._x = None


def note_source(made: torch.Tensor, source: Source) -> None:
    """Whoever would keep `made` may keep its source."""
    storage: Any = made.untyped_storage()
    storage.qft_source = source, made.shape, made._version


def source_of(x: torch.Tensor) -> Source | None:
    """None: x is to be kept itself."""
    source, shape, version = getattr(x.untyped_storage(), "qft_source", (None, None, None))
    return source if shape == x.shape and version == x._version else None
