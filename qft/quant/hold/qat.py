"""Weights in 16 or 32 bits that are multiplied as quant.target will have rounded them: quantization-aware training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from qft.quant.hold.base import Scheme
from qft.quant.layer import siblings
from qft.quant.rounding import TARGETS, Rounding, Target, largest_of, sharing, with_scale
from qft.recipe import Recipe
from qft.recipe.section import Problem
from qft.recipe.training import QuantSection

SHOWN = 8
"""Layers that are left as they are and named: a tower for pictures has hundreds."""


@dataclass(frozen=True)
class Qat(Scheme):
    """A model that is trained as it will be rounded. `dtype` is that of the weights when they are rounded and of what
    is made of them: while all weights are trained, they are held in float32 beside it."""

    keeps_weights = True
    quant_type: str = "int4-g32"
    """quant.target."""
    learns_scales: bool = False
    """quant.learn_scales."""
    more: tuple[str, ...] = ()
    """Of the training, in words."""

    @classmethod
    def of(cls, quant: QuantSection, dtype: str, heads: Sequence[str]) -> Qat:
        name = str(quant.target)
        skipped = () if TARGETS[name].ends else (*heads, *quant.named_skips)
        late = [f"from step {quant.fake_quant_after_steps + 1} on"] if quant.fake_quant_after_steps else []
        share = f", by a share of {quant.distill:g}" if 0 < quant.distill < 1 else ""
        distilled = [f"distilled from itself unrounded{share}"] if quant.distill else []
        learnt = ["scales learnt"] if quant.learn_scales else []
        frozen = [f"activations' range frozen after step {quant.freeze_observers_after_steps}"]
        more = (*late, *learnt, *(frozen if TARGETS[name].observes else []), *distilled)
        return cls("qat", dtype, skipped, None, {}, name, quant.learn_scales, more)

    @property
    def target(self) -> Target:
        return TARGETS[self.quant_type]

    @property
    def learns(self) -> bool:
        """Whether layers have more than weights: scales that are trained, or the range of their inputs."""
        return self.learns_scales or self.target.observes

    @property
    def learnt_as(self) -> tuple[Any, ...] | None:
        return (self.quant_type, self.learns_scales, self.skipped) if self.learns else None

    def words(self) -> str:
        first, rest = self.skipped[:SHOWN], self.skipped[SHOWN:]
        left = ", ".join([*first, *([f"{len(rest)} more"] if rest else [])])
        return ", ".join([*self.details(), *([f"not {left}"] if left else [])])

    def short_words(self) -> str:
        return f"{self.dtype}, rounded to {self.quant_type}"

    def details(self) -> list[str]:
        return [f"qat for {self.quant_type}", f"rounded in {self.dtype}", *self.more]

    def facts(self) -> dict[str, Any]:
        return {"scheme": self.name, "plugin": None, "target": self.quant_type, "skip_modules": list(self.skipped)}

    def problems(self, recipe: Recipe) -> Iterator[Problem]:
        if self.target.ends and recipe.quant.named_skips:
            yield "quant.skip_modules", f"a {self.quant_type} file holds every matrix so; remove it"

        if self.target.dtype and self.dtype != self.target.dtype:
            text = f"compressed-tensors gives {self.quant_type} back in {self.target.dtype} alone"
            yield "model.dtype", f"{text}; set it to {self.target.dtype}"

    def unfit(self, model: PreTrainedModel) -> Iterator[Problem]:
        block = self.target.block
        if not self.holds(model):
            text = "no linear layer is left to be rounded (a torch.nn.Linear within a block)"
            yield "quant.target", f"{text}: leave fewer out (quant.skip_modules), or set quant.mode to none"
        for name in sorted(self.roundings(model)):
            if (columns := model.get_submodule(name).weight.shape[-1]) % block:
                text = f"{name} has rows of {columns} weights, which {block} does not divide"
                remedy = "use another target" + ("" if self.target.ends else ", or name it in quant.skip_modules")
                yield "quant.target", f"{self.quant_type}: {text}; {remedy}"
                return

    def holds(self, model: PreTrainedModel) -> set[str]:
        """Linear layers of the unquantized `model` that the export will round, its ends aside."""
        linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
        return {name for name in linears - self.ends(model) if should_convert_module(name, list(self.skipped))}

    def roundings(self, model: PreTrainedModel) -> dict[str, Rounding]:
        """What becomes of the weight of each module that the format holds in few bits."""
        ends = dict.fromkeys(self.ends(model), self.target.ends) if self.target.ends else {}
        return dict.fromkeys(self.holds(model), self.target.rounding) | ends

    def learnt_beside(self, model: PreTrainedModel) -> int:
        if not self.learns_scales:
            return 0
        size, shapes = self.target.block, (model.get_submodule(name).weight.shape for name in self.holds(model))
        return sum(rows * (columns // size if size > 1 else 1) for rows, columns in shapes)

    def settled(
        self,
        roundings: Mapping[str, Rounding],
        weights: Mapping[str, torch.Tensor],
        scales: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> dict[str, Rounding]:
        """Of the layers whose weights [out, in] are among `weights`, by name, and with which come all parts of their
        modules: `roundings` that ask for one argument alone. `scales` are those that were learnt."""
        held = {name: weights[f"{name}.weight"] for name in roundings if f"{name}.weight" in weights}
        if not self.target.shares:
            return {n: with_scale(roundings[n], scales[n]) if n in scales else roundings[n] for n in held}
        found: dict[str, Rounding] = {}
        for names in siblings(dict.fromkeys(held)):
            largest = [largest_of(held[name]) for name in names]
            found |= {name: sharing(roundings[name], largest) for name in names}
        return found

    @staticmethod
    def ends(model: PreTrainedModel) -> set[str]:
        """Embeddings of tokens, and output head."""
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        return {name for name, module in model.named_modules() if any(module is end for end in ends)}

    def weight_bytes(self, rows: int, columns: int) -> int:
        return rows * columns * int(getattr(torch, self.dtype).itemsize)

    def round_trip(self, weight: torch.Tensor) -> torch.Tensor:
        return self.target.rounding(weight).values
