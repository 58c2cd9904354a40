"""What this machine is: its devices, what they can compute in, and the versions that a result depends on."""

import platform
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

from qft import __version__

PACKAGES = ("transformers", "bitsandbytes", "peft", "accelerate", "datasets", "tokenizers")


@dataclass(frozen=True)
class Device:
    """One place where a model can run."""

    kind: str
    """cpu or cuda"""
    name: str
    total_bytes: int
    """Memory in all: the GPU's, or the host's for a CPU."""
    bf16: bool
    """Whether bfloat16 is computed in, rather than refused or emulated on a GPU."""
    tf32: bool
    capability: str | None = None
    """CUDA compute capability, as in 9.0."""


def find_device(wanted: str) -> Device | None:
    """The device that `model.device` asks for (auto, cpu or cuda); None if it is not there."""
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        return None
    if wanted == "cpu" or not has_cuda:
        return Device("cpu", _cpu_name(), psutil.virtual_memory().total, bf16=True, tf32=False)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    ampere = properties.major >= 8
    capability = f"{properties.major}.{properties.minor}"
    return Device("cuda", properties.name, properties.total_memory, bf16=ampere, tf32=ampere, capability=capability)


def absent_gpu(size: int) -> Device:
    """A GPU of so many bytes that is not there, and can do what those of today can."""
    return Device("cuda", f"a GPU of {size / 2**30:.1f} GiB that is not here", size, bf16=True, tf32=True)


def versions() -> dict[str, str | None]:
    """Versions that matter, by name; None for what is not installed."""
    found: dict[str, str | None] = {
        "qft": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    return found | {package: _installed(package) for package in PACKAGES}


@cache
def _installed(package: str) -> str | None:
    """Its version, which this process imports for good."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """The host, for a manifest."""
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "host_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
        "python": sys.version.split()[0],
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            names = [line.split(":", 1)[1].strip() for line in stream if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {psutil.cpu_count()} threads"
