"""down(act(gate(x)) · up(x)) in two functions, of which the second keeps nothing of its own: what it needs, the first
has kept. A checkpointed block whose MLP comes last is then computed again up to gate and up, and not beyond."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qft.kernels.activation import activate, activate_back
from qft.kernels.buffers import rows_of
from qft.kernels.float8 import Added
from qft.kernels.jit import by_triton
from qft.kernels.keep import Keep
from qft.kernels.layer import Stack
from qft.kernels.project import Project, back, gradients, joint, multiplier, project_joint


@dataclass
class Mlp:
    """Its layers, and the name of its activation in `activation`."""

    first: Stack
    """gate and up."""
    down: Stack
    kind: str
    keep: Keep = field(default_factory=Keep)

    def __post_init__(self) -> None:
        self.first.both_ways = True

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., columns] -> [..., columns]"""
        both = project_joint(x, self.first, kept=self.keep.gates, pending=True)
        out: torch.Tensor = Down.apply(both, self, *self.down.pairs)  # type: ignore[no-untyped-call]
        return out


class Down(torch.autograd.Function):
    """From gate and up to the output."""

    @staticmethod
    def forward(ctx: Any, both: torch.Tensor, mlp: Mlp, *pair: torch.Tensor | None) -> torch.Tensor:
        down = mlp.down
        ctx.mlp, ctx.first = mlp, both.grad_fn
        if ctx.first is None:  # nobody keeps them for us
            ctx.save_for_backward(both)
        lacking, mlp.first.lacking = mlp.first.lacking, None
        if lacking and ctx.first is None:
            lacking.to(rows_of(both.data))
            lacking = None
        h = activate(rows_of(both), mlp.kind, down.border, lacking)
        # Some hundred KB, and no tensor that a checkpointed block would have to be computed again for.
        multiply, ctx.inner = multiplier(h, down)
        return multiply(slice(0, down.rows)).view(*both.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        mlp: Mlp = ctx.mlp
        both, lacking = _kept(ctx)
        made = back(mlp.down, [rows_of(gradient)], rows_of(gradient), wanted=True, pending=True)
        assert made.dx is not None
        dboth, h, most = activate_back(rows_of(both), made.dx, mlp.kind, lacking, made.pending)
        dboth = dboth.view(both.shape)
        if most is not None and ctx.first is not None:
            ctx.first.most = most, dboth, dboth._version
        return (dboth, None, *gradients(mlp.down, made.g, made.gb, h, ctx.inner))


def _kept(ctx: Any) -> tuple[torch.Tensor, Added | None]:
    """gate and up, or made again, and what they lack; what was kept beside them is handed to the function that did: of
    a checkpointed block, it can be asked for once."""
    if ctx.first is None:
        given: torch.Tensor = ctx.saved_tensors[0]
        return given.clone(), None
    if ctx.first.spent:
        raise RuntimeError("gate and up are gone once their gradients took their place: no second backward pass")
    x, inner, both = Project.kept(ctx.first)
    stack: Stack = ctx.mlp.first
    if both is None:
        both, inner, lacking = joint(x, stack, pending=True)
    else:
        lacking = stack.added(inner) if ctx.first.lacks else None
    stack.lacking = None  # of a block that was computed again up to here
    ctx.first.given, ctx.first.spent = (x, inner), by_triton(both)
    return both, lacking
