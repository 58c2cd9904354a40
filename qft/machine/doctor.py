"""What this machine can do, what is missing for what, and which versions do not go together. Imports none of the
packages that it looks at, but torch for the GPU."""

import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from qft.machine.device import Device, describe, find_device

State = Literal["ok", "missing", "broken", "info"]
FLAGS = {
    "avx2": "8-bit and 4-bit products on the CPU are vectorised",
    "avx512_bf16": "bfloat16 products on the CPU are fast",
    "amx_bf16": "bfloat16 products on the CPU are as fast as they get",
}
"""Of /proc/cpuinfo, and what they are for."""
EXTRAS = {
    "gguf": "models from .gguf files, and exports to them",
    "llamacpp": "llama.cpp running an exported .gguf file",
    "calibrate": "qft calibrate with autoround, and exports as compressed-tensors and torchao",
    "eval": "qft eval with tasks of lm-evaluation-harness and more scores",
}
"""Extra of the package -> what needs it."""
OPTIONAL = {
    "triton": "kernels of qft's own on a GPU (train.kernels)",
    "flash-attn": "model.attn_implementation: flash_attention_2",
    "wandb": "train.report_to: wandb",
    "mlflow": "train.report_to: mlflow",
    "trackio": "train.report_to: trackio",
}
"""Packages of no extra, and what needs them."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    part: Literal["machine", "packages", "optional"]
    name: str
    state: State
    text: str


def diagnose(folder: Path) -> list[Finding]:
    """Everything, with the room on the disk of `folder`."""
    device = find_device("auto")
    assert device is not None  # auto falls back to the CPU
    return [*_machine(device, folder), *_own_packages(), *_extras(), *_optional(device)]


def flags(text: str) -> set[str]:
    """Those of the first processor in a /proc/cpuinfo."""
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return set(line.partition(":")[2].split())


def unmet(requirement: Requirement) -> str | None:
    """Why a requirement is not met; None if it is."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return "not installed"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{found} is installed, and {requirement.specifier} is needed"
    return None


def conflicts(name: str, seen: set[str]) -> Iterator[str]:
    """What an installed package asks of others that are installed in another version: `transformers: tokenizers …`."""
    for text in _requires(name):
        needed = Requirement(text)
        why = unmet(needed) if not needed.marker or needed.marker.evaluate({"extra": ""}) else None
        if why and why != "not installed":
            yield f"{name} needs {needed.name}{needed.specifier}: {why}"
        if needed.name not in seen and not why:
            seen.add(needed.name)


def _requires(name: str) -> list[str]:
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []


def _machine(device: Device, folder: Path) -> Iterator[Finding]:
    host = psutil.virtual_memory()
    yield Finding("machine", "python", "info", f"{platform.python_version()} on {platform.platform()}")
    if device.kind == "cuda":
        able = "bfloat16" if device.bf16 else "no bfloat16: train.fp16"
        text = f"{device.name}, {_gib(device.total_bytes)}, compute capability {device.capability}, {able}"
        yield Finding("machine", "gpu", "ok", text)
    else:
        text = "none that torch sees: models of some hundred million weights train on the CPU, larger ones take hours"
        yield Finding("machine", "gpu", "missing", text)
    about = describe()
    yield Finding("machine", "cpu", "info", f"{about['cpu']}, {about['threads']} threads for torch")
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = flags(info.read_text("utf-8", errors="replace"))
        for name, use in FLAGS.items():
            yield Finding("machine", name, "ok" if name in found else "info", use if name in found else f"not: {use}")
    yield Finding("machine", "memory", "info", f"{_gib(host.available)} free of {_gib(host.total)}")
    yield Finding("machine", "disk", "info", f"{_gib(shutil.disk_usage(folder).free)} free in {folder}")


def _own_packages() -> Iterator[Finding]:
    """What qft needs always, and what those packages need of each other."""
    needed = [Requirement(text) for text in _requires("qft")]
    plain = [each for each in needed if not each.marker or each.marker.evaluate({"extra": ""})]
    for each in plain:
        why = unmet(each)
        text = f"{why}: pip install '{each.name}{each.specifier}'" if why else version(each.name)
        yield Finding("packages", each.name, "broken" if why else "ok", text)
    seen: set[str] = set()
    for each in plain:
        for text in conflicts(each.name, seen):
            yield Finding("packages", each.name, "broken", text)


def _extras() -> Iterator[Finding]:
    needed = [Requirement(text) for text in _requires("qft")]
    for extra, use in EXTRAS.items():
        of_it = [
            each for each in needed if each.marker and each.marker.evaluate({"extra": extra}) and each.name != "qft"
        ]
        missing = [f"{each.name} ({why})" for each in of_it if each.name != "qft" and (why := unmet(each))]
        told = f"{use}: {', '.join(missing)}; pip install 'qft[{extra}]'" if missing else use
        yield Finding("optional", extra, "missing" if missing else "ok", told)


def _optional(device: Device) -> Iterator[Finding]:
    for name, use in OPTIONAL.items():
        why = unmet(Requirement(name))
        if device.kind == "cpu" and name in ("triton", "flash-attn"):
            continue
        yield Finding("optional", name, "missing" if why else "ok", f"{use}: pip install {name}" if why else use)


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
