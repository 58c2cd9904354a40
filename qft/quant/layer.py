"""How one linear layer is held or left as it is, whoever quantizes it and whichever way it is written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from qft.recipe.catalogue import SCHEME_FIELDS

T = TypeVar("T")


@dataclass(frozen=True)
class LayerScheme:
    """How one linear layer is held."""

    data_type: str
    """int, float, nf4 or fp4."""
    bits: int
    group_size: int = -1
    """Weights of a row that share a scale; -1: all of it."""
    symmetric: bool = True
    activations: str = "none"
    """none, dynamic or static."""
    double_quant: bool = True
    """Of nf4 and fp4: whether the scales are quantized too."""
    threshold: float = 6.0
    """Of LLM.int8(): the magnitude of an activation from which on its column is multiplied in 16 bits, the paper's."""

    def facts(self) -> dict[str, Any]:
        """As plain values, by the names of the fields of `calibrate`."""
        return {name: getattr(self, name) for name in SCHEME_FIELDS}


@dataclass(frozen=True)
class Settled:
    """Of layers, by their names, what is not to be found out of weights and calibration windows again."""

    scales: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Of weights [out, groups], in float32."""
    largest_inputs: Mapping[str, float] = field(default_factory=dict)

    def within(self, prefix: str) -> Settled:
        """Of the layers whose names begin so, by what follows."""
        return Settled(_within(self.scales, prefix), _within(self.largest_inputs, prefix))


def _within(values: Mapping[str, T], prefix: str) -> dict[str, T]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def siblings(schemes: Mapping[str, Any]) -> list[list[str]]:
    """The names of layers that are held alike and are parts of the same module, together: engines multiply with some of
    them at once (q, k and v; gate and up), and then know but one scale of a whole tensor."""
    found: dict[tuple[str, Any], list[str]] = {}
    for name, scheme in schemes.items():
        found.setdefault((name.rpartition(".")[0], scheme), []).append(name)
    return list(found.values())


def skip_entry(name: str, names: Sequence[str]) -> str:
    """What makes transformers leave exactly this layer of `names` unquantized: its name, ended by $ where it must be.
    transformers matches an entry as a regular expression from the start of a name, up to a dot or the end since 5.24
    and without any end before, and as the end of a name (quantizers_utils.should_convert_module)."""
    alone = not any(re.match(name, other) or other.endswith(name) for other in names if other != name)
    return name if alone else f"{name}$"
