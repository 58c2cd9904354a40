"""Rows times the weights of experts that are dequantized for it, one at a time or a few, and again for the gradient;
with what an adapter adds, computed beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensor

from qft.quant.grouped import Adapted, Chunk, Group, Read, chunks, groups_of, is_able, times


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
        return lambda start, stop: self.weight[start:stop].to(dtype)


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
    def turned(self) -> View:
        """With a and b in each other's places."""
        return replace(self, flipped=not self.flipped)

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
        values = torch.cat([read(number, number + 1) for number in numbers])
        if self.factors:
            delta = self.factors.scaling * (self.factors.left[numbers] @ self.factors.right[numbers])
            values = values + delta.to(values.device, values.dtype)
        values = values.mT if self.flipped else values
        return values[0] if isinstance(self.chosen, int) else values


class _Product(torch.autograd.Function):
    """Rows x [n, in], those of each group times its expert's weight [in, out] and, with factors first [experts, in, r]
    and second [experts, r, out], plus scaling * (x first) second. Weights are made one at a time, and again for the
    gradient; rows of no group become zero."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        first: Any,
        second: Any,
        scaling: float,
        view: View,
        groups: list[Group] | None,
        ends: Any,
    ) -> torch.Tensor:
        ctx.save_for_backward(x if first is not None else None, first, second)
        parts = _parts(x, first, view, ends)
        if groups is None and parts is None:
            groups = list(groups_of(ends, len(x)))
        ctx.own = (scaling, view, groups, ends, parts)
        with torch.autocast(x.device.type, enabled=False):
            if parts is not None:
                out = times(x, view.shape[-1], _reader(view, x.dtype), parts, ends)
                if first is not None and parts:
                    last = parts[-1].last
                    Adapted(first, second, scaling, ends, x.dtype).add(out[:last], x[:last])
                return out
            out, read, end = x.new_empty(len(x), view.shape[-1]), _reader(view, x.dtype), 0
            for number, start, end in groups or ():
                rows, part = x[start:end], out[start:end]
                beside = None
                if first is not None:
                    beside = scaling * (rows @ first[number].to(x.dtype)), second[number].to(x.dtype)
                _multiply(rows, read(number, number + 1)[0], beside, part)
        out[end:] = 0
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (x, first, second), (scaling, view, groups, ends, parts) = ctx.saved_tensors, ctx.own
        back, wanted = _reader(view.turned, gradient.dtype), ctx.needs_input_grad[0]
        own: Any = None
        empty = first is None or (parts is not None and bool(parts))
        firsts: Any = None if empty else torch.zeros_like(first)
        seconds: Any = None if empty else torch.zeros_like(second)
        if parts is not None:
            gradient = gradient.contiguous()
            own = times(gradient, view.shape[-2], back, parts, ends) if wanted else None
            if first is not None and parts:
                last = parts[-1].last
                adapted = Adapted(first, second, scaling, ends, x.dtype)
                firsts, seconds = adapted.back(None if own is None else own[:last], x[:last], gradient[:last])
            return own, firsts, seconds, None, None, None, None
        own, end = gradient.new_empty(len(gradient), view.shape[-2]) if wanted else None, 0
        for number, start, end in groups:
            rows, beside = gradient[start:end], None
            if first is not None:
                a, b = first[number].to(x.dtype), second[number].to(x.dtype)
                inner, inputs = scaling * (rows @ b.mT), x[start:end]
                firsts[number] += inputs.mT @ inner
                seconds[number] += scaling * ((inputs @ a).mT @ rows)
                beside = inner, a.mT
            if own is not None:
                _multiply(rows, back(number, number + 1)[0], beside, own[start:end])
        if own is not None:
            own[end:] = 0
        return own, firsts, seconds, None, None, None, None


def _multiply(
    rows: torch.Tensor, weight: torch.Tensor, beside: tuple[torch.Tensor, torch.Tensor] | None, out: torch.Tensor
) -> None:
    """Rows times weight, summed onto the product of the two beside it; why in this order, _Joined of on_cpu.py says."""
    if beside is None:
        torch.mm(rows, weight, out=out)
    else:
        torch.mm(*beside, out=out).addmm_(rows, weight)


def _parts(x: torch.Tensor, first: Any, view: View, ends: Any) -> list[Chunk] | None:
    """What is multiplied at once where there is a kernel for it; None: one expert after the other."""
    sizes = [*view.shape[-2:], *([] if first is None else [first.shape[-1]])]
    if ends is None or not is_able(x, sizes):
        return None
    return list(chunks(ends, sizes[0] * sizes[1], len(x)))


def _reader(view: View, dtype: torch.dtype) -> Read:
    read = view.store.reader(dtype)
    return (lambda start, stop: read(start, stop).mT) if view.flipped else read


def product(x: torch.Tensor, view: View, groups: list[Group] | None, ends: Any = None) -> torch.Tensor:
    """Rows x [n, in] times the weights [in, out] of their groups: [n, out] in the dtype of x. `ends` [experts] say the
    same on the device, where the groups are those of all experts in their order, and are enough."""
    mixed = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    first = second = None
    if view.factors:
        first, second = view.factors.left, view.factors.right
        first, second = (second.mT, first.mT) if view.flipped else (first, second)
    scaling = view.factors.scaling if view.factors else 0.0
    out: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
        x.to(view.compute or mixed).contiguous(), first, second, scaling, view, groups, ends
    )
    return out.to(x.dtype)
