"""What a recipe asks of several GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from qft.recipe.section import Section
from qft.recipe.training import TrainSection


class DistributedSection(Section):
    """On how many GPUs a training runs, and what each of them holds. The rows of an update are the recipe's, however
    many GPUs share them: train.gradient_accumulation_steps are the forward passes of all of them together."""

    strategy: Literal["auto", "none", "ddp", "fsdp2"] = "auto"
    """none: one GPU; ddp: each GPU holds the whole base; fsdp2: each holds its part of every weight, and gathers a
    block while it is computed. auto: ddp where the whole base fits beside the rest, else fsdp2."""
    gpus: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """GPUs of a node; on a CPU, processes. auto: as many of this machine's as divide the forward passes of an update,
    and one where the recipe asks for what only one can do; under torchrun, as many as were started; on a CPU, 1."""
    nodes: int = Field(1, ge=1)
    """Machines, each of which runs the same command by torchrun, accelerate launch, Slurm or Ray; they must share
    output_dir."""
    global_batch: int | None = Field(None, ge=1)
    """Rows of an update, of all GPUs together; train.gradient_accumulation_steps follows. None: as that says."""
    max_restarts: int = Field(0, ge=0)
    """How often `qft train` starts all processes again when one has ended, from the newest checkpoint."""
    timeout: int = Field(1800, ge=1)
    """Seconds that processes wait for each other in a step."""


def batch_rules(distributed: DistributedSection, train: TrainSection) -> Iterator[tuple[str, str]]:
    """GPUs beside one that is meant to be alone, and updates of rows that forward passes do not come to."""
    if distributed.strategy == "none" and distributed.gpus not in ("auto", 1):
        yield "distributed.gpus", f"{distributed.gpus}, and distributed.strategy none is for one: set it to auto or 1"
    batch, rows = distributed.global_batch, train.per_device_train_batch_size
    if batch and rows != "auto" and batch % rows:
        text = f"{batch} rows are no whole number of forward passes of {rows} (train.per_device_train_batch_size)"
        yield "distributed.global_batch", f"{text}; give a multiple of {rows}"


def two_batches(distributed: DistributedSection, train: TrainSection) -> Iterator[tuple[str, str]]:
    """Where the recipe gives both, an update that has two sizes."""
    batch = distributed.global_batch
    if batch and batch != train.step_rows:
        text = f"{batch}, and train.gradient_accumulation_steps makes updates of {train.step_rows} rows"
        yield "distributed.global_batch", f"{text}; remove one of the two"


def unread_alone(distributed: DistributedSection) -> dict[str, str]:
    """Fields that nothing reads where one GPU is asked for, and why."""
    fields = ("nodes", "max_restarts", "timeout") if distributed.strategy == "none" else ()
    return {f"distributed.{name}": "has no meaning with distributed.strategy none" for name in fields}
