"""How work tells how far it is, and what is measured of one optimizer step."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass

BARS = ContextVar("BARS", default=True)
"""Whether libraries may draw progress bars of their own on a terminal."""


@dataclass(frozen=True)
class Step:
    """One optimizer step, as measured."""

    step: int
    loss: float
    """Mean over the supervised tokens; NaN where the step was skipped for it."""
    learning_rate: float
    grad_norm: float
    """Norm before clipping."""
    tokens: int
    """Tokens that are not padding."""
    padded_tokens: int
    """Tokens with padding."""
    supervised_tokens: int
    rows: int
    seconds: float
    """From taking the batch to the end of the update."""
    memory: int
    """Bytes in use after the step: of the GPU, or of this process on a CPU."""
    peak_memory: int
    skipped: bool = False


class View(AbstractContextManager["View"]):
    """Shows nothing; the base of those that do."""

    def __exit__(self, *failure: object) -> None:
        return None

    def note(self, text: str) -> None:
        """Say what is being done."""

    def begin(self, steps: int, done: int) -> None:
        """The training starts: `steps` in all, `done` of them by the run that is resumed."""

    def step(self, step: Step) -> None:
        """One optimizer step was made."""

    def evaluated(self, step: int, loss: float, perplexity: float, scores: Mapping[str, float]) -> None:
        """The held-out rows were evaluated, which is a note."""
        told = "".join(f", {name.replace('_', ' ')} {share:.1%}" for name, share in scores.items())
        self.note(f"step {step}: held-out loss {loss:.4f}, perplexity {perplexity:.2f}{told}")
