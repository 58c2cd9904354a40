"""Where the time of a training step goes, in seconds, on a CPU and without stalling a GPU."""

import time
from typing import Any

import torch

PHASES = ("data", "forward", "backward", "optimizer")


class PhaseClock:
    """Sums the seconds spent in each phase.

    On a GPU a phase ends with an event in the stream, which is read later, so that measuring waits for nothing."""

    def __init__(self, on_gpu: bool) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._on_gpu = on_gpu
        self._marks: list[tuple[str, Any]] = []

    @property
    def phase(self) -> str:
        """The one under way; empty if it is not counted."""
        return self._marks[-1][0] if self._marks else ""

    def enter(self, phase: str) -> None:
        """End the phase before and begin `phase`; an empty name begins what is not counted."""
        if self._on_gpu:
            mark: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            mark.record()
        else:
            mark = time.perf_counter()
        self._marks.append((phase, mark))

    def settle(self) -> None:
        """Add up the phases that are over. On a GPU: as far as it has come."""
        while len(self._marks) > 1:
            (phase, start), (_, end) = self._marks[:2]
            if self._on_gpu and not end.query():
                return
            if phase:
                self.seconds[phase] += start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
            del self._marks[0]

    def shares(self) -> dict[str, float]:
        """Share of each phase in the sum of all."""
        total = sum(self.seconds.values()) or 1.0
        return {phase: seconds / total for phase, seconds in self.seconds.items()}
