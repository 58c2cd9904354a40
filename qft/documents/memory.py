"""What a training's memory was, as measured: at moments, at the peak of each phase, and what grew from step to step."""

from typing import Literal

from qft.documents.part import Bytes, Part

Suspect = Literal["retained graph", "growing list", "growing cache", "growing tensors", "growing objects", "unknown"]


class MomentMemory(Part):
    """In use at one moment."""

    gpu_allocated_bytes: Bytes | None
    """By tensors; None without a GPU, as is the next."""
    gpu_reserved_bytes: Bytes | None
    """Held by the allocator, for tensors or not."""
    host_resident_bytes: Bytes
    """Of this process."""


class PhaseMemory(Part):
    """The most in one phase."""

    gpu_allocated_bytes: Bytes | None
    """By tensors; None without a GPU, as are the next three."""
    gpu_reserved_bytes: Bytes | None
    gpu_fragmentation_bytes: Bytes | None
    """Reserved less allocated, both at their largest: what the allocator held and no tensor used."""
    gpu_inactive_split_bytes: Bytes | None
    """Free parts of blocks that a tensor holds another part of, at their largest: they cannot be given back."""
    host_resident_bytes: Bytes
    """Of this process."""
    host_measured: Literal["system", "sampled"]
    """system: the phase brought the largest resident set of the process so far, which the system itself keeps (VmHWM,
    ru_maxrss). sampled: it did not, and was looked at 20 times a second; a shorter peak may have been missed, though
    none above the largest of the phases before."""


class Leak(Part):
    """What grew from step to step, beyond the threshold."""

    suspect: Suspect
    """unknown: no Python object grew with it."""
    bytes_per_100_steps: Bytes
    evidence: str
    """Where it is and by how much it grew, in words."""
