"""The memory of a training before anything is loaded, in bytes: of the device at its peak, and of the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import psutil
from transformers import PreTrainedModel

from qft.machine.device import Device
from qft.memory.ledger import Peak
from qft.memory.trace import Few, few_blocks, trace
from qft.memory.work import Ends, Step, Traced, Work

MIB = 2**20
WORKSPACES = 2 * 8 * MIB + 2 * MIB // 8
"""What cuBLAS takes for itself, once for the forward and once for the backward thread: 8 MiB and an eighth each."""
HOPPER_WORKSPACES = 2 * 32 * MIB
"""The same from compute capability 9.0 on (aten/src/ATen/cuda/CublasHandlePool.cpp)."""
CONTEXT = 600 * MIB
"""What CUDA's context and its libraries take of a GPU beside what its allocator holds."""
LATER = 40 * MIB
"""Of the host: libraries that are loaded when the training begins, and the buffers of their kernels."""


@dataclass(frozen=True)
class Prediction:
    """Of one way to train."""

    parts: Mapping[str, Peak]
    """The worst moment of each part of the work."""
    device: Device
    host: int
    """Largest resident set of the process."""
    work: int
    """See Traced."""

    @property
    def peak(self) -> Peak:
        """The worst moment of all, as torch.cuda.max_memory_allocated would have it."""
        return max(self.parts.values(), key=lambda peak: peak.total)

    @property
    def taken(self) -> int:
        """What the device must have."""
        return self.peak.total + (CONTEXT if self.device.kind == "cuda" else 0)


Predictor = Callable[[Step], Prediction]


@dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    identity: str
    """The same for models that are built alike."""
    build: Callable[[], PreTrainedModel]
    """Makes it, unquantized, on the meta device."""
    layers: int
    file_bytes: int
    """Of its weights."""
    dequantized_bytes: int = 0
    """Of the host, while a file is dequantized whole before its weights are held; 0: they are read one by one."""


def predictor(source: Source, work: Work, device: Device) -> Predictor:
    """Predicts steps of a work."""

    def predict(step: Step) -> Prediction:
        found = _traced(source, work, step)
        parts = {part: _with_workspaces(peak, device) for part, peak in found.peaks.items()}
        host = psutil.Process().memory_info().rss + LATER + _of_host(source, parts, device)
        return Prediction(parts, device, host, found.work)

    return predict


def _of_host(source: Source, parts: Mapping[str, Peak], device: Device) -> int:
    """While it is loaded, a file is mapped, and what was read of it counts as resident; to be written, all that is
    trained is copied."""
    written = max(peak.parts.get("trainable_weights", 0) for peak in parts.values())
    step = max(peak.total for peak in parts.values()) if device.kind == "cpu" else 0
    return max(source.file_bytes + source.dequantized_bytes, max(source.file_bytes, written) + step)


_known: dict[tuple[str, str, Step], Ends] = {}
"""What was traced in this process."""
_models: dict[str, Few] = {}
"""Of what; of many blocks it takes as long to build one as to trace it."""


def _traced(source: Source, work: Work, step: Step) -> Traced:
    key = (source.identity, repr(replace(work, optim="")), step)
    if key not in _known:
        few = _models.get(source.identity) or few_blocks(source.build(), source.layers)
        _models[source.identity], _known[key] = few, trace(few, work, step)
    return _known[key].with_optimizer(work.optim, on_gpu=work.on_gpu)


def _with_workspaces(peak: Peak, device: Device) -> Peak:
    if device.kind != "cuda":
        return peak
    size = HOPPER_WORKSPACES if float(device.capability or 0) >= 9 else WORKSPACES
    return Peak(peak.total + size, {**peak.parts, "workspaces": size})
