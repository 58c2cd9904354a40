"""Blocks of a model that are alike: how few of them stand for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

LONGEST_PREFIX, LONGEST_PERIOD, FEWEST = 4, 12, 3


@dataclass(frozen=True)
class Pattern:
    """A stack of blocks: some that come first, and others that come again and again."""

    prefix: int
    period: int
    kept: int
    """Blocks that the stack may be cut to; so may it to one period more."""
    times: int
    """How often the period is missing from the longer of these; 0: it is the whole stack."""


def pattern(blocks: nn.ModuleList) -> Pattern:
    """The shortest pattern; of blocks that follow none, all are its prefix."""
    kinds = [_kind(block) for block in blocks]
    for prefix in range(min(LONGEST_PREFIX, len(kinds)) + 1):
        for period in range(1, LONGEST_PERIOD + 1):
            alike = kinds[prefix + period :] == kinds[prefix : len(kinds) - period]
            rest = len(kinds) - prefix
            # Enough that the first blocks are others than the last.
            kept = rest % period + period * -(-max(FEWEST, 2 * period) // period)
            if alike and rest > kept + period:
                return Pattern(prefix, period, prefix + kept, (rest - kept - period) // period)
    return Pattern(0, len(kinds), 0, 0)


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Everything plain that a block's modules are told apart by, but for their number in the stack."""
    return tuple(
        (name, type(module).__name__, [tuple(p.shape) for p in module.parameters(recurse=False)], _settings(module))
        for name, module in block.named_modules()
    )


def _settings(module: nn.Module) -> dict[str, Any]:
    own = vars(module).items()
    plain = (str, int, float, bool, type(None))
    return {name: value for name, value in own if isinstance(value, plain) and name not in ("layer_idx", "training")}
