"""The weights of all experts of a layer as one parameter [experts, a, b] that is held in few bits.

A `Stacked` says that it is a tensor of that shape, so the model's own code, peft and whoever counts parameters find
what they expect. Taking one expert of it, or transposing it, makes no values. A product does: of one expert at a time,
on the way back once more, and with the adapter's product beside it. Whatever else is computed with it is computed with
all its values, which is right and takes their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

Read = Callable[[int], torch.Tensor]
"""From the number of an expert to its weight [a, b]."""
Group = tuple[int, int, int]
"""Of rows that one expert multiplies: its number, the first row, and the one behind the last."""


class Store(Protocol):
    """What the weights are held in."""

    shape: tuple[int, int, int]

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """By the names of the attributes that they are."""
        ...

    def reader(self, dtype: torch.dtype) -> Read:
        """Dequantizes."""
        ...


class Whole:
    """Weights [experts, a, b] as they are."""

    def __init__(self, weight: torch.Tensor) -> None:
        experts, rows, columns = weight.shape
        self.weight, self.shape = weight, (experts, rows, columns)

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"weight": self.weight}

    def reader(self, dtype: torch.dtype) -> Read:
        return lambda number: self.weight[number].to(dtype)


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to the weights: scaling * left @ right, of each expert."""

    left: torch.Tensor
    """[experts, a, r]"""
    right: torch.Tensor
    """[experts, r, b]"""
    scaling: float

    @property
    def detached(self) -> Factors:
        return replace(self, left=self.left.detach(), right=self.right.detach())


@dataclass(frozen=True)
class View:
    """Which of the stored weights a tensor stands for, and how."""

    store: Store
    dtype: torch.dtype
    """That it says it has."""
    compute: torch.dtype | None = None
    """In which it is multiplied; None: as autocast says, or in that of the other factor."""
    factors: Factors | None = None
    chosen: int | torch.Tensor | None = None
    """One expert, [a, b]; or several, by their numbers [n]; None: all."""
    flipped: bool = False
    """Whether a and b have changed places."""

    @property
    def shape(self) -> tuple[int, ...]:
        count, *matrix = self.store.shape
        matrix = matrix[::-1] if self.flipped else matrix
        if self.chosen is None:
            return (count, *matrix)
        return (*self.chosen.shape, *matrix) if isinstance(self.chosen, torch.Tensor) else tuple(matrix)

    @property
    def numbers(self) -> list[int]:
        """Of the experts that it stands for."""
        if self.chosen is None:
            return list(range(self.store.shape[0]))
        if isinstance(self.chosen, torch.Tensor):
            return [0] * len(self.chosen) if isinstance(self.chosen, FakeTensor) else list(self.chosen.tolist())
        return [self.chosen]

    def whole(self) -> torch.Tensor:
        """All values, the adapter's part of them with its gradient."""
        read, numbers = self.store.reader(self.dtype), self.numbers
        values = torch.stack([read(number) for number in numbers])
        if self.factors:
            delta = self.factors.scaling * (self.factors.left[numbers] @ self.factors.right[numbers])
            values = values + delta.to(values.device, values.dtype)
        values = values.mT if self.flipped else values
        return values[0] if isinstance(self.chosen, int) else values


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


class _Product(torch.autograd.Function):
    """Rows x [n, in], those of each group times its expert's weight [in, out] and, with factors first [experts, in, r]
    and second [experts, r, out], plus scaling * (x first) second. Weights are made one at a time, and again for the
    gradient; rows of no group become zero."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, first: Any, second: Any, scaling: float, view: View, groups: Sequence[Group]
    ) -> torch.Tensor:
        ctx.save_for_backward(x if first is not None else None, first, second)
        ctx.own = (scaling, view, groups)
        out = x.new_empty(len(x), view.shape[-1])
        read, end = _reader(view, x.dtype), 0
        with torch.autocast(x.device.type, enabled=False):
            for number, start, end in groups:
                rows, part = x[start:end], out[start:end]
                torch.mm(rows, read(number), out=part)
                if first is not None:
                    part.addmm_(rows @ first[number].to(x.dtype), second[number].to(x.dtype), alpha=scaling)
        out[end:] = 0
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (x, first, second), (scaling, view, groups) = ctx.saved_tensors, ctx.own
        own = gradient.new_empty(len(gradient), view.shape[-2]) if ctx.needs_input_grad[0] else None
        firsts: Any = None if first is None else torch.zeros_like(first)
        seconds: Any = None if first is None else torch.zeros_like(second)
        read, end = _reader(view, gradient.dtype), 0
        for number, start, end in groups:
            rows = gradient[start:end]
            if own is not None:
                torch.mm(rows, read(number).mT, out=own[start:end])
            if first is not None:
                a, b = first[number].to(x.dtype), second[number].to(x.dtype)
                inner, inputs = scaling * (rows @ b.mT), x[start:end]
                firsts[number] += inputs.mT @ inner
                seconds[number] += scaling * ((inputs @ a).mT @ rows)
                if own is not None:
                    own[start:end].addmm_(inner, a.mT)
        if own is not None:
            own[end:] = 0
        return own, firsts, seconds, None, None, None


def _reader(view: View, dtype: torch.dtype) -> Read:
    read = view.store.reader(dtype)
    return (lambda number: read(number).mT) if view.flipped else read


def product(x: torch.Tensor, view: View, groups: Sequence[Group]) -> torch.Tensor:
    """Rows x [n, in] times the weights [in, out] of their groups: [n, out] in the dtype of x."""
    mixed = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    first = second = None
    if view.factors:
        first, second = view.factors.left, view.factors.right
        first, second = (second.mT, first.mT) if view.flipped else (first, second)
    scaling = view.factors.scaling if view.factors else 0.0
    out: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
        x.to(view.compute or mixed), first, second, scaling, view, groups
    )
    return out.to(x.dtype)


def _flipped(view: View) -> View:
    return replace(view, flipped=not view.flipped)


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
        return product(rows, view, [(view.chosen, 0, len(rows))]).view(*x.shape[:-1], -1)
    if x.ndim != 3 or other.ndim != 3 or len(x) != len(other):
        return NotImplemented
    rows, each = x.reshape(-1, x.shape[-1]), x.shape[1]
    groups = [(number, place * each, (place + 1) * each) for place, number in enumerate(view.numbers)]
    return product(rows, view, groups).view(*x.shape[:-1], -1)


def _grouped(x: torch.Tensor, other: Any, offs: Any = None, bias: Any = None, **_: Any) -> Any:
    """torch.nn.functional.grouped_mm: rows in the order of their experts, `offs` [experts] where each one's end."""
    if not isinstance(other, Stacked) or offs is None or bias is not None or other.view_of.chosen is not None:
        return NotImplemented
    return product(x, other.view_of, list(_groups(offs, len(x), len(other))))


def _groups(offs: torch.Tensor, rows: int, experts: int) -> Iterator[Group]:
    """Of those that have rows. Ends without contents: as if one expert had its share, for what the others take has been
    given back by then."""
    if isinstance(offs, FakeTensor):
        yield 0, 0, -(-rows // experts)
        return
    start = 0
    for number, end in enumerate(offs.tolist()):
        if end > start:
            yield number, start, end
        start = end


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
    return _flipped(view) if same else NotImplemented


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
    "mT": _flipped,
    "to": _to,
    "float": lambda view: replace(view, dtype=torch.float32),
    "bfloat16": lambda view: replace(view, dtype=torch.bfloat16),
    "half": lambda view: replace(view, dtype=torch.float16),
    "contiguous": lambda view, **_: view,
    "detach": lambda view: replace(view, factors=view.factors and view.factors.detached),
}
"""What makes no values."""
