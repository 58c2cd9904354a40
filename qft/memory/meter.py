"""Memory as measured, in bytes: of the GPU by its allocator, of the host by the process's resident set."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qft.documents.memory import MomentMemory, PhaseMemory
from qft.quant.stacked import Stacked


@dataclass(frozen=True)
class Snapshot:
    """Memory in use at one moment."""

    on_gpu: bool
    """Whether a GPU does the work."""
    gpu: int
    """Allocated by tensors; 0 without a GPU."""
    gpu_reserved: int
    """Held by the allocator."""
    host: int
    """Resident set of this process."""

    @property
    def device(self) -> int:
        """Of the device that does the work: of the GPU if there is one, else of the host."""
        return self.gpu if self.on_gpu else self.host

    def document(self) -> MomentMemory:
        return MomentMemory(
            gpu_allocated_bytes=self.gpu if self.on_gpu else None,
            gpu_reserved_bytes=self.gpu_reserved if self.on_gpu else None,
            host_resident_bytes=self.host,
        )

    def beyond(self, before: Snapshot) -> int:
        """What the device holds more than `before`."""
        return max(self.device - before.device, 0)


class HostSampler(threading.Thread):
    """Notes the largest resident set, looking 20 times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="host-memory")
        self.peak = 0
        self._stop_event = threading.Event()
        self._process = psutil.Process()

    def run(self) -> None:
        while not self._stop_event.wait(0.05):
            self.look()

    def look(self) -> int:
        now = int(self._process.memory_info().rss)
        self.peak = max(self.peak, now)
        return now

    def stop(self) -> None:
        self._stop_event.set()


def resident_peak() -> int:
    """Largest resident set of this process since it began, in bytes, as the system keeps it; 0 where it does not. Never
    reset: other programs, such as `time -v`, read the same figure."""
    if sys.platform == "linux":  # not ru_maxrss, which begins with that of the program that started this one
        with suppress(OSError, ValueError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")), 0)
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))


def child_peak() -> int:
    """Largest resident set of any one process that this one started and that has ended, in bytes; 0 on Windows."""
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Meter:
    """Measures one device and the host while it is entered, phase by phase where it is told of phases."""

    def __init__(self, kind: str, phase: str | None = None) -> None:
        """`phase`: one that began with the process, and goes on."""
        self.on_gpu = kind == "cuda"
        self.sampler = HostSampler()
        self.ended: dict[str, PhaseMemory] = {}
        """The phases that are over."""
        self._phase = phase
        self._known_high = 0 if phase else resident_peak()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()  # an earlier run of this process is not this one's

    def __enter__(self) -> Meter:
        self.sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.enter(None)
        self.sampler.stop()

    def now(self) -> Snapshot:
        gpu = torch.cuda.memory_allocated() if self.on_gpu else 0
        reserved = torch.cuda.memory_reserved() if self.on_gpu else 0
        return Snapshot(self.on_gpu, gpu, reserved, self.sampler.look())

    def settled(self) -> Snapshot:
        """Memory in use once what is no longer needed has gone back to the system."""
        gc.collect()
        if sys.platform == "linux":
            # glibc keeps freed blocks: without this, what loading used would hide what training uses.
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)
        return self.now()

    def peak(self) -> Snapshot:
        """Largest values since the last restart."""
        gpu = torch.cuda.max_memory_allocated() if self.on_gpu else 0
        reserved = torch.cuda.max_memory_reserved() if self.on_gpu else 0
        return Snapshot(self.on_gpu, gpu, reserved, self._host_peak()[0])

    def restart(self) -> None:
        """Forget the peaks so far."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.sampler.peak, self._known_high = 0, resident_peak()

    def enter(self, phase: str | None) -> None:
        """End the phase before, and begin `phase` if there is one."""
        self.ended = self.phases()
        self._phase = phase
        self.restart()

    def phases(self) -> dict[str, PhaseMemory]:
        """The most in each phase, the one that goes on included."""
        return larger(self.ended, {self._phase: self._so_far()}) if self._phase else self.ended

    def _so_far(self) -> PhaseMemory:
        peak, (host, measured) = self.peak(), self._host_peak()
        stats = torch.cuda.memory_stats() if self.on_gpu else {}
        return PhaseMemory(
            gpu_allocated_bytes=peak.gpu if self.on_gpu else None,
            gpu_reserved_bytes=peak.gpu_reserved if self.on_gpu else None,
            gpu_fragmentation_bytes=peak.gpu_reserved - peak.gpu if self.on_gpu else None,
            gpu_inactive_split_bytes=stats.get("inactive_split_bytes.all.peak", 0) if self.on_gpu else None,
            host_resident_bytes=host,
            host_measured=measured,
        )

    def _host_peak(self) -> tuple[int, Literal["system", "sampled"]]:
        self.sampler.look()
        high = resident_peak()
        return (high, "system") if high > self._known_high else (self.sampler.peak, "sampled")


def larger(one: Mapping[str, PhaseMemory], other: Mapping[str, PhaseMemory]) -> dict[str, PhaseMemory]:
    """The largest values of each phase."""
    both = {phase: _larger(one[phase], other[phase]) for phase in one.keys() & other.keys()}
    return {**one, **other, **both}


def _larger(one: PhaseMemory, other: PhaseMemory) -> PhaseMemory:
    first = max(one, other, key=lambda phase: phase.host_resident_bytes)
    most = {
        name: max((v for v in (getattr(one, name), getattr(other, name)) if v is not None), default=None)
        for name in PhaseMemory.model_fields
        if name != "host_measured"
    }
    return first.model_copy(update=most)


def wait_for_device() -> None:
    """Until the GPU has done what it was given; at once without one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of the model's weights: `frozen` (with the scales of quantized ones) and `trainable`."""
    frozen: list[torch.Tensor] = list(model.buffers())
    trainable: list[torch.Tensor] = []
    for module in model.modules():
        # Its first forward pass moves the scales of an 8-bit weight to the layer's state.
        frozen.extend(_tensors(getattr(module, "state", None), "CB", "SCB"))
    for parameter in model.parameters():
        (trainable if parameter.requires_grad else frozen).append(parameter)
        frozen.extend(_scales(parameter))
    return {"frozen": tensor_bytes(frozen), "trainable": tensor_bytes(trainable)}


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state tensors."""
    states = (value for state in optimizer.state.values() for value in state.values())
    return tensor_bytes(value for value in states if isinstance(value, torch.Tensor))


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once (tied weights share one)."""
    storages = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for tensor in tensors
        for part in parts_of(tensor)
        if part.device.type != "meta"
    }
    return sum(storages.values())


def parts_of(tensor: Any) -> Iterator[torch.Tensor]:
    """The tensors that one of torchao's classes, or experts in few bits, are made of, and any other tensor itself."""
    if isinstance(tensor, Stacked):
        yield from tensor.view_of.store.tensors.values()
        return
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for part in (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]):
        if isinstance(part, torch.Tensor):  # a DTensor has its mesh beside them
            yield from parts_of(part)


def _scales(parameter: Any) -> list[torch.Tensor]:
    """What bitsandbytes keeps beside a quantized weight: scales, code books, nested states."""
    found = _tensors(parameter, "CB", "SCB")
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        found += _tensors(state, "absmax", "code", "offset")
        state = state.state2
    return found


def _tensors(owner: Any, *names: str) -> list[torch.Tensor]:
    values = (getattr(owner, name, None) for name in names)
    return [value for value in values if isinstance(value, torch.Tensor)]
