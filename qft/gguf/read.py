"""The weights of a GGUF file by their Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch

from qft.gguf.shape import architecture, deinterleave, heads_to_interleave

__all__ = ["read_gguf"]


def read_gguf(path: Path, config: Any) -> Callable[[str], torch.Tensor | None]:
    """A function from the name of a weight to its values, float32 in the order of Hugging Face; None if the file has no
    such weight. `config` is the model's."""
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    arch = architecture(config)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)

    def read(name: str) -> torch.Tensor | None:
        tensor = held.get(names.get_name(name, try_suffixes=(".weight", ".bias")))
        if tensor is None:
            return None
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        heads = heads_to_interleave(name, config, arch)
        return torch.tensor(deinterleave(values, heads) if heads else values)

    return read
