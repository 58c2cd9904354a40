"""How many of a model's weights are held in few bits, by count, whichever scheme says that it holds them.

What counts are weights that make a model large and that people mean by "4 bits": parameters of two dimensions or more
outside embeddings (of tokens and of positions) and output head. Norms and biases are vectors and stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from qft.quant.dequantize import is_quantized
from qft.quant.experts import expert_parameters, owner
from qft.quant.stacked import Stacked

LEAST = 0.9
"""Of the weights that are not asked to be left out, the share that a scheme should hold to go by its name."""


@dataclass(frozen=True)
class Held:
    """Weights, by count."""

    quantized: int
    asked_out: int
    """Left as they are by request."""
    total: int
    largest_left: str = ""
    """The module that holds most of those that are left by nobody's request."""

    @property
    def share(self) -> float:
        """quantized / total."""
        return self.quantized / max(self.total, 1)

    @property
    def is_partial(self) -> bool:
        """Whether too many are left as they are by nobody's request."""
        return self.quantized + self.asked_out < LEAST * self.total

    def words(self) -> str:
        """What is quantized, and what is not by nobody's request."""
        share = f"{self.share:.1%} of the weights outside embeddings and head are quantized"
        why = "being no plain torch.nn.Linear, or read by other code"
        return f"{share}; {self.largest_left} and its like are not, {why}"

    @classmethod
    def of(cls, weights: Mapping[str, int], quantized: Collection[str], asked_out: Callable[[str], bool]) -> Held:
        """From the weights by module, and the modules that are quantized, or are to be left."""
        left = {name: count for name, count in weights.items() if name not in quantized}
        passed_over = {name: count for name, count in left.items() if not asked_out(name)}
        total, largest = sum(weights.values()), max(passed_over, key=passed_over.__getitem__, default="")
        return cls(total - sum(left.values()), sum(left.values()) - sum(passed_over.values()), total, largest)


def count_weights(model: PreTrainedModel) -> dict[str, int]:
    """Weights of each module that holds any of its own; of a quantized linear layer, as many as it stands for."""
    head, counts = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or module is head:
            continue
        own = [p.numel() for p in module.parameters(recurse=False) if p.ndim >= 2]
        counts[name] = module.in_features * module.out_features if isinstance(module, nn.Linear) else sum(own)
    return {name: count for name, count in counts.items() if count}


def measured_share(model: PreTrainedModel) -> float:
    """The share of a loaded model that bitsandbytes or a plugin holds."""
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and is_quantized(module)}
    experts = {owner(name) for name, held in expert_parameters(model).items() if isinstance(held, Stacked)}
    return Held.of(count_weights(model), linears | experts, lambda name: False).share
