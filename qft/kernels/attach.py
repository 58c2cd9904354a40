"""Kernels put in the place of a model's own code, part by part, and taken away where they do not agree with it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from qft.errors import first_line
from qft.kernels.buffers import SCRATCH
from qft.kernels.check import Check
from qft.kernels.float8 import Dither
from qft.kernels.in_place import put_forward
from qft.kernels.keep import Keep
from qft.kernels.layer import Stack
from qft.kernels.mlp import Mlp
from qft.kernels.norm import rms_norm
from qft.kernels.project import project
from qft.kernels.rotary import may_rotate, rotary
from qft.kernels.seams import (
    GroupSeam,
    MlpSeam,
    NormSeam,
    RotarySeam,
    find_groups,
    find_mlps,
    find_norms,
    find_rotary,
    watch,
)

MLP, LINEAR, NORM, ROTARY = "MLPs", "linear layers", "norms", "rotary positions"
FLOAT8 = "products in float8"
"""Not a kind of modules, but how those of the first two multiply by what is frozen."""


@dataclass
class Applied:
    """What was fused, and what was not."""

    fused: Counter[str] = field(default_factory=Counter)
    """Modules by what they are."""
    plain: Counter[str] = field(default_factory=Counter)
    """Modules by why they take their own code."""
    keeps: list[Keep] = field(default_factory=list)
    """What each block keeps: everything, unless somebody says otherwise."""
    undo: dict[str, list[Callable[[], None]]] = field(default_factory=dict)
    stacks: dict[str, list[Stack]] = field(default_factory=dict)
    """What modules of a kind multiply with."""
    dither: Dither = field(default_factory=Dither)
    """By whose step what is in float8 is rounded otherwise in each."""

    def put(self, kind: str, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Have `forward` in the place of the module's own."""
        self.undo.setdefault(kind, []).append(put_forward(module, forward))

    def take_back(self, kind: str) -> None:
        """Let the modules of that kind take their own code again."""
        for undo in self.undo.pop(kind, []):
            undo()
        self.stacks.pop(kind, None)

    def in_float8(self, *, on: bool) -> None:
        """Have frozen products be in float8 where they can, or none."""
        SCRATCH.clear()
        stacks = [stack for of_kind in self.stacks.values() for stack in of_kind]
        for number, stack in enumerate(stacks):
            stack.float8, stack.dither = on and stack.why_not_float8() is None, partial(self.dither.of, number)
            stack.expect()
        if on:
            self.fused[FLOAT8] = sum(len(stack.layers) for stack in stacks if stack.float8)
            for stack in stacks:
                if reason := stack.why_not_float8():
                    self.plain[f"{FLOAT8}: {reason}"] += len(stack.layers)
        self.fused += Counter()  # without those of which there is none


def apply(model: nn.Module, blocks: nn.ModuleList, kinds: Collection[str], mixed: torch.dtype | None) -> Applied:
    """Fuse what can be of these kinds in a model that is to be trained, under autocast in `mixed`. Its weights and the
    random numbers are left as they were."""
    applied = Applied(keeps=[Keep() for _ in blocks])
    check = Check(model, blocks, mixed)
    found = _found(model, blocks, kinds, check, applied)
    for kind in found:
        applied.fused[kind] = len(found[kind])
    put: dict[str, Callable[[], None]] = {kind: partial(_put_all, parts) for kind, parts in found.items()}
    for all_of_kind in put.values():
        all_of_kind()
    check.keep_what_agrees(applied, put)
    if FLOAT8 in kinds and (reason := check.differs_by(partial(applied.in_float8, on=True))):
        count = applied.fused.pop(FLOAT8, 0)
        applied.in_float8(on=False)
        applied.plain[f"{FLOAT8}: {reason}"] = count
    return applied


def expect(model: nn.Module, blocks: nn.ModuleList, kinds: Collection[str], mixed: torch.dtype | None) -> Applied:
    """What `apply` would do, if all parts agreed, to a model of tensors without contents: as far as shapes go."""
    applied = Applied(keeps=[Keep() for _ in blocks])
    if not kinds:
        return applied
    check = Check(model, blocks, mixed)
    for kind, parts in _found(model, blocks, kinds, check, applied).items():
        applied.fused[kind] = len(parts)
        _put_all(parts)
    if FLOAT8 in kinds:
        applied.in_float8(on=True)
    return applied


def _put_all(parts: list[Callable[[], None]]) -> None:
    for put in parts:
        put()


def _found(
    model: nn.Module, blocks: nn.ModuleList, kinds: Collection[str], check: Check, applied: Applied
) -> dict[str, list[Callable[[], None]]]:
    """By kind, what puts a kernel in the place of each module; the kinds that others rest on first."""
    try:
        seen = watch(model, check.run)
    except Exception as error:  # a model can be anything
        applied.plain[f"the model runs on nothing but its own data: {first_line(error)}"] = 1
        return {}
    borders: dict[nn.Module, int] = {}
    stacks: dict[nn.Module | None, Stack] = {}
    mlps = find_mlps(blocks, seen, applied.plain, check.in_training) if MLP in kinds else []
    taken = {layer.module for seam in mlps for layer in seam.layers}
    groups = find_groups(blocks, seen, taken, applied.plain, frozen=FLOAT8 in kinds) if LINEAR in kinds else []
    norms = find_norms(model, seen) if NORM in kinds else []
    keep_of = {module: keep for block, keep in zip(blocks, applied.keeps, strict=True) for module in block.modules()}
    turns = find_rotary(blocks, seen) if ROTARY in kinds else []
    found: dict[str, list[Callable[[], None]]] = {
        MLP: [partial(_put_mlp, seam, applied, borders, keep_of[seam.module]) for seam in mlps],
        LINEAR: [put for seam in groups for put in _puts_of_group(seam, applied, borders, stacks)],
        NORM: [partial(_put_norm, seam, applied, borders, keep_of.get(seam.module)) for seam in norms],
        ROTARY: [partial(_put_rotary, seam, applied, stacks.get(seam.module)) for seam in turns],
    }
    return {kind: parts for kind, parts in found.items() if parts}


def _put_mlp(seam: MlpSeam, applied: Applied, borders: dict[nn.Module, int], keep: Keep) -> None:
    module, plain = seam.module, seam.module.forward
    mlp = Mlp(Stack(seam.layers[:2]), Stack(seam.layers[2:]), seam.kind, keep)
    stacks, dtype = (mlp.first, mlp.down), mlp.first.dtype
    borders[module] = mlp.first.border
    applied.stacks.setdefault(MLP, []).extend(stacks)

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not _may(module, x, dtype) or not all(stack.is_as_found() for stack in stacks):
            return plain(x, *args, **kwargs)
        return mlp(x)

    applied.put(MLP, module, forward)


def _puts_of_group(
    seam: GroupSeam, applied: Applied, borders: dict[nn.Module, int], stacks: dict[nn.Module | None, Stack]
) -> list[Callable[[], None]]:
    """The first layer that is called computes all of them, and the others are handed theirs."""
    stack = Stack(seam.layers)
    if len(seam.layers) > 1:
        stacks[seam.module] = stack
    waiting: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def put(number: int) -> None:
        module = seam.layers[number].module
        plain = module.forward
        borders[module] = stack.border
        if number == 0:
            applied.stacks.setdefault(LINEAR, []).append(stack)

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            given, made = waiting.pop(number, (None, None))
            if given is x:
                return made
            waiting.clear()
            if args or kwargs or not _may(module, x, stack.given) or not stack.is_as_found():
                return plain(x, *args, **kwargs)
            outs = project(x.to(stack.dtype), stack)
            waiting.update({i: (x, out) for i, out in enumerate(outs) if i != number})
            return outs[number]

        applied.put(LINEAR, module, forward)

    return [partial(put, number) for number in range(len(seam.layers))]


def _put_norm(seam: NormSeam, applied: Applied, borders: dict[nn.Module, int], keep: Keep | None) -> None:
    module, plain = seam.module, seam.module.forward
    border = max((borders.get(fed, 0) for fed in seam.feeds), default=0)

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not _may(module, x, x.dtype):
            return plain(x, *args, **kwargs)
        return rms_norm(x, next(module.parameters()), seam.eps, seam.shift, seam.dtype, border, keep)

    applied.put(NORM, module, forward)


def _put_rotary(seam: RotarySeam, applied: Applied, stack: Stack | None) -> None:
    """The module's own code, in which one name is another function."""
    module, plain = seam.module, seam.module.forward
    code = inspect.unwrap(type(module).forward)

    def turn(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *others: Any, **named: Any) -> Any:
        if others or named or not _on_gpu(q) or not may_rotate(q, k, cos, sin):
            return seam.rotate(q, k, cos, sin, *others, **named)
        return rotary(q, k, cos, sin, stack)

    names = {**code.__globals__, seam.name: turn}
    own = FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)
    own.__kwdefaults__ = code.__kwdefaults__

    def forward(*args: Any, **kwargs: Any) -> Any:
        fused = module.training and torch.is_grad_enabled()
        return own(module, *args, **kwargs) if fused else plain(*args, **kwargs)

    applied.put(ROTARY, module, forward)


def _may(module: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a fused forward pass is asked for: of a training, on a GPU, of some tokens."""
    return module.training and _on_gpu(x) and x.dtype == dtype and x.numel() > 0 and torch.is_grad_enabled()


def _on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda or isinstance(x, FakeTensor)
