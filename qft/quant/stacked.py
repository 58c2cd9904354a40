"""The weights of all experts of a layer as one parameter [experts, a, b] that is held in few bits.

A `Stacked` says that it is a tensor of that shape, so the model's own code, peft and whoever counts parameters find
what they expect. Taking one expert of it, or transposing it, makes no values. A product does: of one expert at a time,
or a few, on the way back once more, and with the adapter's product beside it. Whatever else is computed with it is
computed with all its values, which is right and takes their memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from qft.quant.product import View, product


class _NeedsValues(Exception):
    """What is computed is no product."""


class Stacked(torch.Tensor):
    """A tensor without values of its own, which `view` has."""

    view_of: View

    @staticmethod
    def __new__(cls, view: View) -> Stacked:
        device = next(iter(view.store.tensors.values())).device
        made: Stacked = torch.Tensor._make_wrapper_subclass(cls, view.shape, dtype=view.dtype, device=device)
        made.view_of = view
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]
        name = func.__self__.__name__ if name == "__get__" else name
        made = PRODUCTS[name](*args, **kwargs) if name in PRODUCTS else NotImplemented
        if made is NotImplemented and name in VIEWS and isinstance(args[0], Stacked):
            made = VIEWS[name](args[0].view_of, *args[1:], **kwargs)
        if made is not NotImplemented:
            return Stacked(made) if isinstance(made, View) else made
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        except _NeedsValues:
            args, kwargs = tree_map(_values, (args, kwargs))
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Stacked(args[0].view_of)
        raise _NeedsValues

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Stacked({list(self.view_of.shape)}, {type(self.view_of.store).__name__})"


def _values(value: Any) -> Any:
    return value.view_of.whole() if isinstance(value, Stacked) else value


def _linear(x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> Any:
    """functional.linear"""
    out = _matmul(x, weight.T) if isinstance(weight, Stacked) and weight.ndim == 2 else NotImplemented
    return out if bias is None or out is NotImplemented else out + bias.to(out.dtype)


def _matmul(x: Any, other: Any) -> Any:
    """torch.matmul and its kin: of one expert's weight, or of several in a batch, on either side."""
    if isinstance(x, Stacked):
        left_out = isinstance(other, Stacked) or other.ndim < 2
        return NotImplemented if left_out else _matmul(other.mT, x.mT).mT
    view: View = other.view_of
    if other.ndim == 2 and isinstance(view.chosen, int):
        rows = x.reshape(-1, x.shape[-1])
        return product(rows, view, [(view.chosen, 0, len(rows))]).view(*x.shape[:-1], view.shape[-1])
    if x.ndim != 3 or other.ndim != 3 or len(x) != len(other):
        return NotImplemented
    rows, each = x.reshape(-1, x.shape[-1]), x.shape[1]
    groups = [(number, place * each, (place + 1) * each) for place, number in enumerate(view.numbers)]
    ends = None
    if view.chosen is None:
        ends = torch.arange(each, len(rows) + 1, each, dtype=torch.int32, device=x.device) if each else None
    return product(rows, view, groups, ends).view(*x.shape[:-1], view.shape[-1])


def _grouped(x: torch.Tensor, other: Any, offs: Any = None, bias: Any = None, **_: Any) -> Any:
    """torch.nn.functional.grouped_mm: rows in the order of their experts, `offs` [experts] where each one's end."""
    if not isinstance(other, Stacked) or offs is None or bias is not None or other.view_of.chosen is not None:
        return NotImplemented
    return product(x, other.view_of, None, offs)


def _item(view: View, index: Any) -> Any:
    """weight[index] of all experts."""
    if view.chosen is not None or isinstance(index, bool):
        return NotImplemented
    if isinstance(index, torch.Tensor):
        if index.is_floating_point() or index.dtype in (torch.bool, torch.uint8) or index.ndim > 1:
            return NotImplemented
        index = index if index.ndim else 0 if isinstance(index, FakeTensor) else int(index)
    if isinstance(index, int):
        index = range(view.store.shape[0])[index]
    return replace(view, chosen=index) if isinstance(index, int | torch.Tensor) else NotImplemented


def _unbound(view: View, dim: int = 0) -> Any:
    if view.chosen is not None or dim != 0:
        return NotImplemented
    return tuple(Stacked(replace(view, chosen=number)) for number in view.numbers)


def _transposed(view: View, *dims: Any) -> Any:
    count = len(view.shape)
    same = sorted(dim % count for dim in dims) == [count - 2, count - 1]
    return view.turned if same else NotImplemented


def _to(view: View, *args: Any, **kwargs: Any) -> Any:
    """Another dtype, or the same device."""
    wanted = [*args, *(value for name, value in kwargs.items() if name in ("dtype", "device"))]
    dtype = next((value for value in wanted if isinstance(value, torch.dtype)), view.dtype)
    here = next(iter(view.store.tensors.values())).device
    moved = [torch.device(value) for value in wanted if isinstance(value, str | torch.device)]
    if any(place.type != here.type for place in moved) or any(isinstance(value, torch.Tensor) for value in wanted):
        return NotImplemented
    return replace(view, dtype=dtype)


PRODUCTS: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "__matmul__", "mm", "bmm"), _matmul),
    "__rmatmul__": lambda other, x: _matmul(x, other),
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped),
}
"""What is computed one expert at a time, by the names that torch and transformers have for it."""
VIEWS: dict[str, Callable[..., Any]] = {
    "__getitem__": _item,
    "select": lambda view, dim, index: _item(view, index) if dim == 0 else NotImplemented,
    "index_select": lambda view, dim, index: _item(view, index) if dim == 0 else NotImplemented,
    "unbind": _unbound,
    "__iter__": lambda view: iter(_unbound(view)),
    "transpose": _transposed,
    "swapaxes": _transposed,
    "t": lambda view: _transposed(view, 0, 1) if len(view.shape) == 2 else NotImplemented,
    "T": lambda view: _transposed(view, 0, 1) if len(view.shape) == 2 else NotImplemented,
    "mT": lambda view: view.turned,
    "to": _to,
    "float": lambda view: replace(view, dtype=torch.float32),
    "bfloat16": lambda view: replace(view, dtype=torch.bfloat16),
    "half": lambda view: replace(view, dtype=torch.float16),
    "contiguous": lambda view, **_: view,
    "detach": lambda view: replace(view, factors=view.factors and view.factors.detached),
}
"""What makes no values."""
