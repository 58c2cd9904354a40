"""What is traced, and what is found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qft.documents.plan import Kept
from qft.memory.ledger import Peak, in_granules
from qft.memory.optimizers import state_bytes, step_bytes
from qft.quant.hold import Scheme

UPDATE = "update"
"""Part of the work that an optimizer does."""
MIDDLE = "other blocks"
"""Part of the work that is none of the worst: what lies between the first blocks and the last."""
IMAGES = ", images"
"""Behind a part of the work: what is done with images before the first block."""


@dataclass(frozen=True)
class Seen:
    """What a model is given of rows with images."""

    digest: str
    """Of all that memory depends on."""
    inputs: Mapping[str, torch.Tensor] = field(repr=False, compare=False)
    """Tokens, their mask, and what its processor makes of the images."""


@dataclass(frozen=True)
class Batch:
    """What one forward pass is given."""

    rows: int
    tokens: int
    """Of the longest row, padding included."""
    padded: bool
    """Whether any row is shorter."""
    learnt: int = 0
    """Tokens whose predictions are compared, where Work.distill is."""
    seen: Seen | None = None
    """None: there are no images."""


@dataclass(frozen=True)
class Step:
    """How an optimizer step is made."""

    batch: Batch
    """Of a micro-batch."""
    kept: Kept
    """What each block keeps for the backward pass."""
    accumulates: bool
    """Whether it has several micro-batches."""


@dataclass(frozen=True)
class Work:
    """What the memory of a training depends on, beside its model and its steps."""

    scheme: Scheme
    lora: dict[str, Any] | None
    """Arguments of peft.LoraConfig; None: all weights are trained."""
    optim: str
    """By its name in the recipe, as the two below are what train says."""
    label_smoothing_factor: float
    neftune: bool
    mixed: torch.dtype | None
    """Of autocast; None: there is none."""
    on_gpu: bool
    logit_bytes: int | None
    """What logits may take at once where the loss is computed from few of them; None: it is computed from all."""
    offloads: bool
    """Whether the frozen weights of the blocks wait elsewhere."""
    held_out: Batch | None
    """What is evaluated."""
    answered: Batch | None = None
    """What is answered, the longest answers included."""
    stashes: bool = False
    """Whether the inputs of checkpointed blocks wait on the host."""
    kernels: tuple[str, ...] = ()
    """Kinds of parts that kernels of qft's own compute in training."""
    masks: bool = False
    """Whether training is given masks, which tell apart what shares a row."""
    distill: float = 0.0
    """The share of the loss that is the divergence from the unrounded model; 0: none is."""


@dataclass(frozen=True)
class Traced:
    """One step and an evaluation, without what the optimizer takes."""

    peaks: dict[str, Peak]
    """By part of the work: forward, head, the blocks of the backward pass, update, evaluation."""
    work: int
    """Of the step: multiplications with additions, those of attention as so many more as they take longer."""
    trained: tuple[torch.Size, ...] = ()
    """Shapes of its parameters that are."""

    def with_optimizer(self, optim: str, *, on_gpu: bool) -> Traced:
        """With its state, which is there whatever is done, and what its update takes."""
        state = state_bytes(optim, self.trained)
        taken = in_granules(step_bytes(optim, self.trained, on_gpu=on_gpu))
        peaks = {part: peak.with_more("optimizer_state", state) for part, peak in self.peaks.items()}
        peaks[UPDATE] = peaks[UPDATE].with_more("activations", taken)
        return replace(self, peaks=peaks)

    def extrapolated(self, longer: Traced, times: int) -> Traced:
        """Between the first blocks and the last, peaks rise or fall from one to the next: none is the highest."""
        ends = (part for part in longer.peaks if part != MIDDLE)
        peaks = {part: self.peaks[part].extrapolated(longer.peaks[part], times) for part in ends}
        return Traced(peaks, longer.work + times * (longer.work - self.work))


@dataclass(frozen=True)
class Ends:
    """What two models of few blocks tell of one of many."""

    shorter: Traced
    longer: Traced
    times: int
    """How often what lies between them is missing from the longer; 0: that is the whole model."""

    def with_optimizer(self, optim: str, *, on_gpu: bool) -> Traced:
        """Of the whole model."""
        one, other = (each.with_optimizer(optim, on_gpu=on_gpu) for each in (self.shorter, self.longer))
        return one.extrapolated(other, self.times) if self.times else other
