"""What the table of engines calls the weights of a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qft.recipe.loads import compressed
from qft.serving.command import read_config


def formats_in(folder: Path) -> list[str]:
    """Each format of the folder's layers; of an adapter, with its base's where that is on this machine. Raises
    MissingError and ModelError for a configuration that is not there or cannot be read."""
    if not (folder / "adapter_config.json").is_file():
        return list(dict.fromkeys(_held(read_config(folder / "config.json"))))
    config = read_config(folder / "adapter_config.json")
    base = Path(str(config.get("base_model_name_or_path")))
    held = formats_in(base) if base.is_dir() else ["merged"]
    special = ", with DoRA or modules_to_save" if config.get("use_dora") or config.get("modules_to_save") else ""
    return [f"adapter on a {'16-bit' if name == 'merged' else name} base{special}" for name in held]


def _held(config: Mapping[str, Any]) -> Iterator[str]:
    found = config.get("quantization_config")
    method = str(found.get("quant_method")) if isinstance(found, dict) else "merged"
    groups = found.get("config_groups") if isinstance(found, dict) else None
    if method == "compressed-tensors" and isinstance(groups, dict):
        yield from (_compressed(group) for group in groups.values() if isinstance(group, dict))
    elif method == "bitsandbytes" and found:
        yield "bnb-4bit" if found.get("load_in_4bit") else "bnb-8bit"
    else:
        yield method


def _compressed(group: Mapping[str, Any]) -> str:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    scheme = SimpleNamespace(
        bits=weights.get("num_bits"),
        symmetric=weights.get("symmetric", True),
        data_type=weights.get("type", "int"),
        group_size=weights.get("group_size"),
        activations="none" if not inputs else "dynamic" if inputs.get("dynamic") else "static",
    )
    return compressed(scheme)
