"""What several GPUs change of the memory that one alone would take, by arithmetic."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from qft.checkpoint.skeleton import find_blocks
from qft.memory.ledger import Peak
from qft.memory.predict import Prediction, Predictor
from qft.memory.work import Step
from qft.plan.model import ModelPlan
from qft.plan.placement import Placement


def by_placement(predict: Predictor, model: ModelPlan, placement: Placement) -> Predictor:
    """Predicts for one of the GPUs what `predict` does for one that is alone."""
    if placement.size == 1:
        return predict

    def predicted(step: Step) -> Prediction:
        found = predict(step)
        change = sharded_peak if placement.sharded else _replicated
        return replace(found, parts={part: change(peak, model, placement) for part, peak in found.parts.items()})

    return predicted


def _replicated(peak: Peak, model: ModelPlan, placement: Placement) -> Peak:
    """DDP keeps gradients a second time, in the buckets that it reduces."""
    buckets = model.shape.trainable_parameters * 4
    return Peak(peak.total + buckets, {**peak.parts, "gradient_buckets": buckets})


def sharded_peak(peak: Peak, model: ModelPlan, placement: Placement) -> Peak:
    """FSDP2 keeps a part of each weight, what is around the blocks whole from its first use on, and two blocks whole at
    a time: the one that is computed, and the one that is on its way."""
    size, parts = placement.size, dict(peak.parts)
    held = Held.of(model)
    parts["base_weights"] = held.kept + -(-(held.blocks + held.around) // size)
    parts["gathered_weights"] = held.around + 2 * held.block
    for name in ("trainable_weights", "gradients", "optimizer_state"):
        parts[name] = -(-parts.get(name, 0) // size)
    adapters = 4 * model.shape.trainable_parameters // max(model.shape.layers, 1)
    parts["gathered_weights"] += 3 * adapters  # two blocks' weights, and the gradients of one before they are reduced
    return Peak(sum(parts.values()), parts)


def loads_by_block(model: ModelPlan) -> bool:
    """Whether a base that is to be sharded is read block by block: not one that comes quantized."""
    return not model.checkpoint.quantization or bool(model.checkpoint.packed)


class Held:
    """Bytes of a frozen base, by what FSDP2 does with them."""

    def __init__(self, blocks: int, block: int, around: int, kept: int, weight: int) -> None:
        self.blocks, self.block, self.around, self.kept = blocks, block, around, kept
        """Of all blocks, of the largest, of what is around them; and what is not sharded: scales of 4-bit weights."""
        self.weight = weight
        """Of the largest weight of a block, as it is read."""

    @classmethod
    def of(cls, model: ModelPlan) -> Held:
        skeleton, found = model.skeleton, find_blocks(model.skeleton, model.shape.layers)
        held = model.scheme.holds(skeleton) or set()
        sizes = [_bytes(block, f"{found[0]}.{i}.", held, model) for i, block in enumerate(found[1])]
        whole, scales = _bytes(skeleton, "", held, model)
        blocks = sum(size for size, _ in sizes)
        largest = max(p.numel() for block in found[1] for p in block.parameters())
        weight = largest * getattr(torch, model.dtype).itemsize
        return cls(blocks, max(size for size, _ in sizes), whole - blocks, scales, weight)

    def at_load(self, model: ModelPlan, placement: Placement) -> int:
        """At most, while the base is loaded, and sharded if it is to be."""
        if not placement.sharded or not loads_by_block(model):
            return self.whole
        share = -(-self.blocks // placement.size)
        return self.around + self.kept + self.block + max(self.weight, share)

    @property
    def whole(self) -> int:
        """On one GPU."""
        return self.blocks + self.around + self.kept


def _bytes(module: nn.Module, prefix: str, held: set[str], model: ModelPlan) -> tuple[int, int]:
    """Of its weights, tied ones once: what shards, and what does not."""
    width, weights, scales, seen = getattr(torch, model.dtype).itemsize, 0, 0, set[int]()
    for name, part in module.named_modules():
        for kind, parameter in part.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if kind == "weight" and f"{prefix}{name}" in held and parameter.dim() == 2:
                packed = -(-parameter.numel() // 2)
                weights += packed
                scales += model.scheme.weight_bytes(*parameter.shape) - packed
            else:
                weights += parameter.numel() * width
    return weights, scales
