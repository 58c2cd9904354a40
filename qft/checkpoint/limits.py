"""What a configuration asks for, against what its weight files can hold: one wrong by a few digits would be built
for hours, or fill the memory."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qft.errors import ModelError

LAYERS = re.compile(r"^(n_layers?|depth|block_count|(\w+_)?num_\w*(layers|blocks)|\w+_(layers|depth|blocks))$")
PARTS = re.compile(r"^(n_heads?|\w*head_count\w*|expert_count|(\w+_)?num_\w*(heads|experts|groups)|n_\w*experts)$")
"""Fields of a configuration, and ends of a GGUF file's keys, that say how often something is built."""
ALWAYS = {LAYERS: 512, PARTS: 8192}
"""How often any files may ask for: more than the largest model has, and built within seconds."""
WEIGHTS_PER_BYTE = 16
"""That no file reaches: the smallest quantizations take more than a bit a weight."""


def require_counts(asked: str, numbers: Mapping[str, Any], tensors: int) -> None:
    """Raise ModelError if a raw configuration, or a GGUF file's header, asks for more layers, heads or experts than
    there can be in so many tensors."""
    for name, number in _numbers(numbers, ""):
        for kind, always in ALWAYS.items():
            if kind.match(name.rpartition(".")[2]) and not 0 <= number <= max(always, tensors):
                text = f"asks for {name} {number:,}, and the weight files hold {tensors:,} tensors"
                raise ModelError(f"{asked}: its configuration {text}; one of the two is damaged")


def require_parameters(asked: str, parameters: int, files: list[Path]) -> None:
    """Raise ModelError if the weights that a configuration asks for cannot be in its files."""
    held = sum(path.stat().st_size for path in files)
    if files and parameters > held * WEIGHTS_PER_BYTE:
        raise ModelError(
            f"{asked}: its configuration asks for {parameters:,} parameters, and its weight files have {held:,} bytes; "
            "one of the two is damaged, or belongs to another model"
        )


def _numbers(value: Any, place: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{place}.{name}" if place else str(name))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield place, value
