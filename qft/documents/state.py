"""What a checkpoint holds beside the Trainer's files: for the report of a resumed run what had been measured by then
(qft_state.json), and what its files hash to (qft_checkpoint.json)."""

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from qft.documents.memory import PhaseMemory
from qft.documents.part import Bytes, Seconds, Stored, Tokens
from qft.documents.training import Evaluation, ModelPart, OutOfMemory
from qft.errors import RunError
from qft.progress import Step


class TrainingState(Stored):
    """What a training had measured by the time of a checkpoint. Numbers that are not finite are texts."""

    schema_version: Literal[1] = 1
    kind: Literal["training-state"] = "training-state"
    steps: list[Step] = []
    unmeasured_steps: int = 0
    """Steps before those, made by a qft that kept none of their figures."""
    evaluations: dict[str, Evaluation] = {}
    """By the moment: before, step-N; stage-N: before that stage, on its base."""
    phase_seconds: dict[str, Seconds] = {}
    """Of data, forward, backward and optimizer."""
    wall_seconds: Seconds = 0.0
    peak_gpu_bytes: Bytes = 0
    peak_gpu_reserved_bytes: Bytes = 0
    peak_host_bytes: Bytes = 0
    memory_phases: dict[str, PhaseMemory] = {}
    """The most in each phase; the one in which the checkpoint was written, up to then."""
    largest_micro_batch_tokens: Tokens = 0
    recomputed: tuple[int, float] | None = None
    """What gradient checkpointing saved in bytes, and its seconds in one step; None where it was off."""
    out_of_memory: list[OutOfMemory] = []
    """What was changed because memory ran out: the rest of the training goes on so."""
    models: dict[str, ModelPart] = {}
    """As each stage so far had it, by its number; empty without train.stages."""
    windows: list[int] = []
    """Of data.streaming: rows behind each window of them that was encoded so far."""
    evaluation_due: bool = False
    """Whether the evaluation of this step was still to be made."""


class CheckpointHashes(Stored):
    """qft_checkpoint.json, which is written last."""

    schema_version: Literal[1] = 1
    kind: Literal["checkpoint"] = "checkpoint"
    files: dict[str, str] = {}
    """SHA-256 of each file of the checkpoint, and of what else it needs, by its path from the checkpoint's folder."""


def read_state(path: Path) -> TrainingState | None:
    """None if there is none: an older qft wrote the checkpoint. Raises RunError if it cannot be read."""
    try:
        return TrainingState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        text = "cannot be read; delete it to go on without the figures of the steps so far"
        raise RunError(f"{path}: {text}") from None
