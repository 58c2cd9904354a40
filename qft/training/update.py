"""What is noted of one optimizer step on its way, and read behind it without stalling a GPU."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from qft.distributed.rows import Places
from qft.distributed.world import world


class Moment:
    """A point in the work of the device; where there is a GPU, of its stream."""

    def __init__(self, on_gpu: bool) -> None:
        self._mark: Any = torch.cuda.Event(enable_timing=True) if on_gpu else None  # type: ignore[no-untyped-call]
        if self._mark:
            self._mark.record()
        self._time = time.perf_counter()

    def seconds_since(self, other: Moment) -> float:
        """Once both have been reached."""
        if self._mark:
            return float(other._mark.elapsed_time(self._mark)) / 1e3
        return self._time - other._time

    def wait(self) -> None:
        """Until the device has come to it."""
        if self._mark:
            self._mark.synchronize()


class Sent:
    """Numbers on their way to the host."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
        self._numbers.copy_(numbers.detach(), non_blocking=True)
        self._there = Moment(numbers.is_cuda)

    def read(self) -> Any:
        """Waits for them, if they are not there yet."""
        self._there.wait()
        return self._numbers.tolist()


@dataclass
class LogEntry:
    """What is to be logged once it is known."""

    loss: Sent
    """The sum of the losses since the last entry."""
    steps: int
    start_time: float
    epoch: float | None


@dataclass
class Update:
    """What the micro-batches of a step give stays on the device until it is read."""

    started: Moment
    losses: list[torch.Tensor] = field(default_factory=list)
    counts: list[torch.Tensor] = field(default_factory=list)
    """Tokens, and supervised ones."""
    rows: list[Places] = field(default_factory=list)
    row_count: int = 0
    """Without fillers."""
    padded_tokens: int = 0
    grad_norm: Any = 0.0
    learning_rate: float = 0.0
    step: int = 0
    memory: int = 0
    peak_memory: int = 0
    """Behind it, in bytes."""
    ended: Moment | None = None
    numbers: list[float] = field(default_factory=list)
    """The losses and the norm, once they are read."""
    sums: list[float] = field(default_factory=list)
    """Of all processes: losses; how many have one that is not finite; tokens, supervised ones, padded ones, rows; and
    how many have had a signal."""
    skipped: bool = False
    entry: LogEntry | None = None

    def ask(self, *, asked: bool) -> torch.Tensor:
        """Have the numbers added up with the other processes and sent to the host, all together; `asked`: a signal has
        come to this one. The loss of each is times their number, as the Trainer has it, whose gradients are averaged.
        Returns, where they are, whether one is not finite: bool []."""
        losses = torch.stack(self.losses).double()
        norm = torch.as_tensor(self.grad_norm).to(losses).reshape(1)
        known = torch.tensor([self.padded_tokens, self.row_count, asked], dtype=losses.dtype, pin_memory=losses.is_cuda)
        sums = torch.stack([losses.sum() / world().size, (~losses.isfinite()).any()])
        counts = torch.stack(self.counts).sum(0).to(losses)
        sums = world().added(torch.cat([sums, counts, known.to(losses.device, non_blocking=True)]))
        self._sent = Sent(torch.cat([losses, norm, sums]))
        return (sums[1] > 0) | ~norm.isfinite().all()

    def read(self) -> None:
        """Wait for them, if they are not there yet."""
        if not self.numbers:
            sent, own = self._sent.read(), len(self.losses) + 1
            self.numbers, self.sums = sent[:own], sent[own:]

    def is_bad(self, *, scaled: bool) -> bool:
        """Whether a loss, or the norm, is not finite. Under loss scaling (`scaled`) an overflowing gradient is
        everyday: the scaler itself skips the step and lowers its scale."""
        return bool(self.sums[1]) or (not math.isfinite(self.numbers[len(self.losses)]) and not scaled)

    @property
    def asked(self) -> bool:
        """Whether a signal has come to any process."""
        return bool(self.sums and self.sums[-1])

    @property
    def bad_batches(self) -> list[int]:
        """Micro-batches whose loss is not finite."""
        return [i for i, loss in enumerate(self.numbers[: len(self.losses)]) if not math.isfinite(loss)]


def skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an update can be left out on the device, without asking the host: torch's fused Adam looks at found_inf,
    as it is told by a scaler of losses."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) and fused
