"""What a model reads of images, among tensors without contents: which tokens stand for one, how many patches it has. A
model's own code asks for those numbers, so what is computed of them alone is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
FEW = 4096
"""Places of tokens or patches that are counted through; more would make masks of too many contents."""


class Known(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Entered above a FakeTensorMode: whatever is computed of tensors with contents alone has contents, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            if func.overloadpacket in INDEXED:
                args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
            return func(*args, **kwargs)
        made = None if given else func(*args, **kwargs)
        if made is not None and not (func.overloadpacket is torch.ops.aten.arange and made.numel() <= FEW):
            return made
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def _places(index: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """A mask as the places that it lets through: how many those are, its shape does not say."""
    if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return (index,)
    with unset_fake_temporarily():
        return index.nonzero(as_tuple=True)
