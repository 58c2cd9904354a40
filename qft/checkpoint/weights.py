"""The weights of a checkpoint, by name; and weights as safetensors files with their index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from qft.checkpoint.added import tables
from qft.checkpoint.conversion import Conversion, Group
from qft.checkpoint.find import Checkpoint
from qft.checkpoint.finite import require_finite
from qft.checkpoint.language import auto_class
from qft.checkpoint.quick_gguf import quick_gguf
from qft.checkpoint.require import require_loaded
from qft.checkpoint.stored import DTYPES, Packed, read_header
from qft.errors import ModelError
from qft.files import atomic_file, write_json


def dequantized(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a GGUF file. Raises ModelError if the file lacks a weight."""
    arguments = checkpoint.load_arguments | {"config": checkpoint.config}
    if hasattr(transformers, "GgufConfig"):  # from 5.23 on, GGUF weights stay packed unless told otherwise
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: PreTrainedModel
    with quick_gguf():
        model, info = auto_class(checkpoint.config).from_pretrained(
            **arguments, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    require_loaded(checkpoint, model, info)
    require_finite(checkpoint.path, model.named_parameters())
    return model


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file. Raises ModelError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: SafetensorError) -> ModelError:
    return ModelError(f"{path}: is damaged or cut off ({error}); copy or download it again")


@dataclass(frozen=True)
class PackedWeight:
    """What a weight of the model is made of."""

    group: Group
    values: Mapping[str, Callable[[Mapping[str, torch.Tensor]], torch.Tensor]]
    """Of each tensor of the group."""
    parts: Mapping[str, Mapping[str, torch.Tensor]]
    """Of each, what it is made of."""


class Weights:
    """The unquantized weights of a checkpoint, by the names that `model`, which may be without contents, has for
    them."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        """Reads headers, but for GGUF, which is dequantized here. Raises as `Checkpoint.tensors`."""
        self.path = checkpoint.path
        self.whole: dict[str, torch.Tensor] | None = None
        if checkpoint.gguf_file:
            self.whole = dequantized(checkpoint.as_stored, torch.float32).state_dict()
        self.stored = {} if checkpoint.gguf_file else checkpoint.tensors()
        self.conversion = Conversion(model, {name: tensor.empty() for name, tensor in self.stored.items()})
        self.added = dict.fromkeys(tables(model), checkpoint.added) if checkpoint.added else {}
        self._last: tuple[Group, dict[str, torch.Tensor]] | None = None
        self._open: tuple[Path, Any] | None = None

    @property
    def rules(self) -> list[Any] | None:
        """Of `as_saved`, those by which they are read; None: they come from no safetensors."""
        return self.conversion.used if self.whole is None else None

    def find(self, name: str) -> torch.Tensor | None:
        """A weight by its name in the model, with the rows of tokens that the recipe adds; None: the files have
        none."""
        found = self._find(name)
        return found if found is None or name not in self.added else self.added[name].grown(found)

    def _find(self, name: str) -> torch.Tensor | None:
        if self.whole is not None:
            return self.whole.get(name)
        group = self.conversion.source.get(name)
        if group is None:
            return None
        if self._last and self._last[0] is group:
            return self._last[1][name]
        made = group.made(self._load, self.conversion.model)
        self._last = (group, made) if len(made) > 1 else None  # those of one group are asked for in a row
        return made[name]

    def __call__(self, name: str) -> torch.Tensor:
        """The same. Raises ModelError if the files have none."""
        if (tensor := self.find(name)) is None:
            raise ModelError(f"{self.path}: has no weight called {name}")
        return tensor

    def as_packed(self, name: str) -> PackedWeight | None:
        """A weight as the files hold it, by its name in the model; None: not in few bits, or not as one of its own."""
        group, packed = self.conversion.source.get(name), self._packed(name)
        if group is None or not packed:
            return None
        parts = {part: {what: self._read(*place) for what, place in own.parts.items()} for part, own in packed.items()}
        return PackedWeight(group, {part: own.values for part, own in packed.items()}, parts)

    def packed_sizes(self) -> dict[str, int]:
        """Bytes of each weight that `as_packed` returns, by its name."""
        packed = {name: self._packed(name) for name in self.conversion.source}
        return {name: sum(own.size for own in parts.values()) for name, parts in packed.items() if parts}

    def _packed(self, name: str) -> dict[str, Packed]:
        """What a weight that is as `as_packed` says is made of, by names in the files."""
        group = self.conversion.source.get(name)
        names = [part for _, part in group.parts] if group else []
        found = {part: packed for part in names if (packed := self.stored[part].packed)}
        shared = sum(other is group for other in self.conversion.source.values()) > 1
        return {} if shared or len(found) < len(names) else found

    def _load(self, name: str) -> torch.Tensor:
        stored = self.stored[name]
        if packed := stored.packed:
            parts = {what: self._read(*place) for what, place in packed.parts.items()}
            tensor = packed.values(parts).to(DTYPES[stored.kind])
        else:
            tensor = self._read(stored.path, name)
        require_finite(stored.path, [(name, tensor)])
        return tensor

    def _read(self, path: Path, name: str) -> torch.Tensor:
        # A mixture has thousands in a file, whose header tells of them all.
        try:
            if self._open is None or self._open[0] != path:
                self._open = path, safe_open(path, framework="pt")
            tensor: torch.Tensor = self._open[1].get_tensor(name)
        except SafetensorError as error:
            raise _damaged(path, error) from error
        return tensor


def stored_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what is in the files of safetensors, one tensor at a time, by its name."""
    for name, stored in checkpoint.tensors().items():
        with open_tensors(stored.path) as file:
            yield name, file.get_tensor(name)


def tensors_in(paths: Iterable[Path]) -> dict[str, Path]:
    """Which of the safetensors files holds which tensor, by its name."""
    where: dict[str, Path] = {}
    for path in paths:
        where |= dict.fromkeys(read_header(path), path)
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
