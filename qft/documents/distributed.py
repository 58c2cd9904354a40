"""What several processes of one training measured, in its report."""

from qft.documents.part import Bytes, Part, Seconds


class RankReport(Part):
    """What one process of several measured."""

    device: str
    host: str
    peak_gpu_bytes: Bytes
    """0 without a GPU. Of all phases, as are the next two."""
    peak_gpu_reserved_bytes: Bytes
    peak_host_bytes: Bytes
    train_peak_bytes: Bytes
    """Of the device, in the steps alone; of the host: resident set."""
    phase_seconds: dict[str, Seconds]
    """Of data, forward, backward and optimizer; who is ahead waits for the others in the backward pass."""
    wall_seconds: Seconds


class BitGate(Part):
    """Whether packed weights came out of FSDP2's gathers as they were loaded; else the run has ended."""

    layers: int
    """That were looked at."""
    layers_changed: int
    bytes: Bytes
    """Of packed weights."""
    seconds: Seconds
    """That looking took, on the first process."""


class Distributed(Part):
    """A training by several processes."""

    strategy: str
    nodes: int
    ranks: list[RankReport]
    """In their order."""
    slowest_rank: int
    """Which took the longest to read and to compute."""
    bit_gate: BitGate | None = None
    """None: no packed weights were sharded."""
