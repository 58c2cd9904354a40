"""Which files of a folder are its weights, as transformers finds them, and what their headers say of each tensor.

Those are model.safetensors or, without it, the files that model.safetensors.index.json names; config.json may name
another file in their place (transformers_weights). Whatever else lies in the folder is left alone.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from qft.disk import disk_failures
from qft.errors import MissingError, ModelError, first_line
from qft.files import require_pulled

INDEX_END = ".safetensors.index.json"
NEITHER = f"has no .safetensors weights by the names {SAFE_WEIGHTS_NAME} and {SAFE_WEIGHTS_INDEX_NAME}"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""By their names in safetensors files; weights that are not quantized have no others."""


@dataclass(frozen=True)
class Packed:
    """How a weight is made that files hold in few bits."""

    parts: Mapping[str, tuple[Path, str]]
    """File, and name there, of what it is made of, by what each is."""
    values: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
    """From those tensors."""
    size: int
    """Of those, in bytes."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file, by the file's header."""

    path: Path
    shape: tuple[int, ...]
    kind: str
    """Its dtype, as safetensors calls it."""
    packed: Packed | None = None
    """None: it is there as it is."""

    def empty(self) -> torch.Tensor:
        """It without contents; of an unknown dtype as bytes."""
        return torch.empty(self.shape, dtype=DTYPES.get(self.kind, torch.uint8), device="meta")


def chosen_file(names: Iterable[str], named: str | None = None) -> str | None:
    """Of the files of a folder, the one that transformers starts from; None: it has no safetensors weights. `named` is
    what config.json says of it."""
    wanted = [named] if named else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    here = set(names)
    return next((name for name in wanted if name in here), None)


def weight_names(folder: Path, config: PretrainedConfig | None = None) -> list[str]:
    """Names of the files that hold the weights, in the order in which transformers reads them. Reads the index, and
    none of them. Raises ModelError for an index that is broken or leads out of the folder, MissingError if there is
    neither."""
    name = _start(folder, config)
    if name is None:
        raise MissingError(f"{folder}: {NEITHER}")
    names = sorted(set(_weight_map(folder / name).values())) if name.endswith(INDEX_END) else [name]
    extra = [name for name in getattr(type(config), "extra_files", ()) if (folder / name).is_file()]
    return [*names, *(name for name in extra if name not in names)]


def weight_files(folder: Path, config: PretrainedConfig | None = None) -> list[Path]:
    """The files themselves. Raises what `weight_names` does, and MissingError for those that are not there."""
    paths = [folder / name for name in weight_names(folder, config)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise MissingError(f"{folder}: its index names {some(missing)}, which {_is(missing)} not there")
    for path in paths:
        require_pulled(path)
    return paths


def stored_tensors(folder: Path, config: PretrainedConfig | None = None) -> dict[str, Stored]:
    """Every tensor of a folder's weights by its name, from the headers alone. Raises what `weight_files` does, and
    ModelError for a file that is broken or holds other tensors than the index says."""
    paths = weight_files(folder, config)
    found: dict[str, Stored] = {}
    for path in paths:
        found |= read_header(path)  # of two, transformers takes the last
    name = _start(folder, config)
    if name and name.endswith(INDEX_END):
        _require_indexed(folder / name, found)
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file. Raises ModelError if it is none, or not whole."""
    try:
        with disk_failures(path), safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            return {name: Stored(path, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read: {first_line(error)}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def some(names: Iterable[str]) -> str:
    """The first few of many names, and how many there are more."""
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _start(folder: Path, config: PretrainedConfig | None) -> str | None:
    return chosen_file((path.name for path in folder.iterdir()), getattr(config, "transformers_weights", None))


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _weight_map(index: Path) -> dict[str, str]:
    """File of each tensor, by its name. Raises ModelError for an index that is not to be followed."""
    try:
        content: Any = json.loads(index.read_text("utf-8"))
        named = content["weight_map"]
        known = isinstance(content["metadata"], dict) and isinstance(named, dict) and bool(named)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index}: is no index of weights: {first_line(error)}") from error
    if not known or not all(isinstance(name, str) for name in named.values()):
        raise ModelError(f"{index}: is no index of weights: it names no file for each tensor")
    for name in sorted(set(named.values())):
        parts = PurePath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise ModelError(f"{index}: names {name}, which leads out of the folder")
        if parts.suffix != ".safetensors":
            raise ModelError(f"{index}: names {name}, which is no safetensors file; unpickling can run any code")
    return dict(named)


def _require_indexed(index: Path, found: Mapping[str, Stored]) -> None:
    """Raise ModelError unless each tensor is in the file that the index says, and will be taken from it."""
    for name, file in _weight_map(index).items():
        path = index.parent / file
        if name not in found or (found[name].path != path and name not in read_header(path)):
            raise ModelError(f"{index}: says that {name} is in {file}, which does not hold it")
        if found[name].path != path:
            other = found[name].path.name
            raise ModelError(f"{index}: says that {name} is in {file}, but {other} holds one too, which would be taken")
