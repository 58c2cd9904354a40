"""What lies in a checkpoint of the Trainer, read without torch."""

import json
from pathlib import Path
from typing import Any

STATE = "qft_state.json"
"""What the run had measured by then: documents.state.TrainingState."""
TRAINER_STATE = "trainer_state.json"
"""Which the Trainer writes last."""
PARTS = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def is_whole(checkpoint: Path) -> bool:
    """Whether a training can go on from it."""
    try:
        _state(checkpoint)
    except (OSError, ValueError):
        return False
    return all((checkpoint / name).exists() for name in PARTS)


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps made by the time of a checkpoint; 0 without one."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def waited(checkpoint: Path) -> int:
    """Evaluations since the best one, as early stopping counted them; 0 if it did not."""
    stopping = _state(checkpoint).get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
    return int(stopping.get("attributes", {}).get("early_stopping_patience_counter", 0))


def best_of(checkpoint: Path) -> Path | None:
    """The checkpoint that had the lowest held-out loss so far, beside this one, wherever the run lay then."""
    best = _state(checkpoint).get("best_model_checkpoint")
    return checkpoint.with_name(Path(best).name) if best else None


def is_over(checkpoint: Path, steps: int, patience: int | None) -> bool:
    """Whether a training of `steps` that stops early after `patience` evaluations has nothing more to do."""
    return step_of(checkpoint) >= steps or (patience is not None and waited(checkpoint) >= patience)


def _state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / TRAINER_STATE).read_text("utf-8"))
    return state
