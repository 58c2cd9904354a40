"""The weights of a checkpoint, by name; and weights as safetensors files with their index."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from qft.checkpoint.find import Checkpoint
from qft.errors import ModelError
from qft.files import atomic_file, write_json


def dequantized(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    arguments = checkpoint.load_arguments | {"config": checkpoint.config}
    if hasattr(transformers, "GgufConfig"):  # from 5.23 on, GGUF weights stay packed unless told otherwise
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(**arguments, dtype=dtype)


def read_weights(checkpoint: Checkpoint) -> Callable[[str], torch.Tensor]:
    """A function from a parameter's name to its unquantized value."""
    if checkpoint.gguf_file:
        weights: dict[str, torch.Tensor] = dequantized(checkpoint, torch.float32).state_dict()
        return weights.__getitem__
    held = reader(checkpoint.weight_files())

    def read(name: str) -> torch.Tensor:
        if (tensor := held(name)) is None:
            raise ModelError(f"{checkpoint.path}: has no weight called {name}")
        return tensor

    return read


def reader(paths: Iterable[Path]) -> Callable[[str], torch.Tensor | None]:
    """A function from the name of a tensor in safetensors files to its value; None: they have none."""
    where = tensors_in(paths)

    def read(name: str) -> torch.Tensor | None:
        if name not in where:
            return None
        with safe_open(where[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    return read


def tensors_in(paths: Iterable[Path]) -> dict[str, Path]:
    """Which of the safetensors files holds which tensor, by its name."""
    where: dict[str, Path] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            where.update(dict.fromkeys(file.keys(), path))
    return where


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, header: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, atomically; `header` is what it says beside its format."""
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"} | dict(header or {}))


def write_index(folder: Path) -> None:
    """model.safetensors.index.json of the safetensors files in `folder`: which file holds which tensor."""
    paths = sorted(folder.glob("*.safetensors"))
    where = {name: path.name for name, path in sorted(tensors_in(paths).items())}
    index = {"metadata": {"total_size": sum(path.stat().st_size for path in paths)}, "weight_map": where}
    write_json(folder / "model.safetensors.index.json", index)
