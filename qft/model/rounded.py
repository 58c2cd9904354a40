"""What quantization-aware training has learnt of layers beside their weights, as a file beside the adapter's or the
model's; and a loaded model that rounds as planned."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from qft.checkpoint.weights import open_tensors, save_tensors
from qft.errors import ModelError
from qft.plan import ModelPlan
from qft.quant.hold import Qat
from qft.quant.layer import Settled
from qft.quant.rounded import round_as
from qft.quant.rounding_state import KEYS, RoundingState, learnt_scale, state_of

FILE = "rounding.safetensors"


def round_weights(model: Any, plan: ModelPlan) -> None:
    """Make a loaded model, its adapter attached, multiply as planned with quant.mode qat; others are left as they are.
    Raises ModelError for an embedding that does more than look up."""
    if isinstance(plan.scheme, Qat):
        round_as(model, plan.scheme, plan.scheme.roundings(plan.skeleton))


def write_learnt(model: Any, folder: Path) -> None:
    """Write what the model has learnt besides into the folder of its weights, if it does learn."""
    if state := state_of(model):
        held = {f"{name}.{key}": tensor for name, own in state.by_name.items() for key, tensor in own.held().items()}
        save_tensors({name: tensor.cpu().contiguous() for name, tensor in held.items()}, folder / FILE)


def read_learnt(model: Any, folder: Path) -> None:
    """Have the model, if it learns, go on from what was written there. Raises ModelError for what does not fit."""
    if state := state_of(model):
        _take(state, read_state(folder), folder / FILE)


def _take(state: RoundingState, tensors: dict[str, torch.Tensor], path: Path) -> None:
    for name, layer in state.by_name.items():
        own = {key: tensors.pop(f"{name}.{key}") for key in KEYS if f"{name}.{key}" in tensors}
        try:
            layer.take(own)
        except ValueError as error:
            raise ModelError(f"{path}: {name}: {error}") from error
    if tensors:
        raise ModelError(f"{path}: holds {min(tensors)}, which no layer has")


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    """What a training has written of all layers; empty if it learnt nothing besides."""
    if not (folder / FILE).is_file():
        return {}
    with open_tensors(folder / FILE) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping


def settled(folder: Path, layers: Collection[str]) -> Settled:
    """What an export makes of it. Raises ModelError if the file has nothing of one of `layers`."""
    tensors = read_state(folder)
    scales, largest = {}, {}
    for name in layers:
        start, change, seen = (tensors.get(f"{name}.{key}") for key in KEYS)
        if start is not None and change is not None:
            scales[name] = learnt_scale(start, change)
        elif seen is None:
            raise ModelError(f"{folder / FILE}: has nothing of {name}")
        if seen is not None:
            largest[name] = float(seen)
    return Settled(scales, largest)
