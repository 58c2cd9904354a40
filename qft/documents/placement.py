"""What `qft check` says of several GPUs."""

from typing import Literal

from qft.documents.part import Bytes, Stored


class PlannedPlacement(Stored):
    """One way to train on them. Of each GPU, where nothing else is said."""

    strategy: Literal["none", "ddp", "fsdp2"]
    cannot: str | None = None
    """Why it is none. None: it is one, and the figures below are there, but for those that nothing predicts."""
    load_bytes: Bytes | None = None
    """While the base is loaded: whole, with fsdp2 too, which shards it then."""
    peak_bytes: Bytes | None = None
    """In the steps, with what CUDA takes beside its allocator."""
    fits: bool | None = None
    """Whether both are within the budget."""
    host_bytes: Bytes | None = None
    """Of each node, all its processes together; the files of the weights count once."""
    gathered_bytes: Bytes | None = None
    """That it receives of weights in a micro-batch."""
    reduced_bytes: Bytes | None = None
    """That it receives of gradients in an update."""
    rows: int | None = None
    """Of a micro-batch."""
    accumulated: int | None = None
    """Micro-batches of each GPU in an update."""
    steps: int | None = None
    """Optimizer steps in all."""


class PlannedGpus(Stored):
    """A training on several GPUs, by arithmetic."""

    gpus: int
    """Of a node."""
    nodes: int
    device_bytes: Bytes
    budget_bytes: Bytes
    chosen: Literal["none", "ddp", "fsdp2"] | None = None
    """What `qft train` would do there; None: none is possible."""
    placements: list[PlannedPlacement] = []
