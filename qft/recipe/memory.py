"""What a recipe asks of memory."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from qft.recipe.section import Section

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})")
SHARE = re.compile(r"(\d+(?:\.\d+)?) ?%")


def size_in_bytes(text: str) -> int | None:
    """`24GiB` in bytes; None if it is no size."""
    found = SIZE.fullmatch(text.strip())
    return round(float(found[1]) * UNITS[found[2]]) if found else None


def _as_bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if size := size_in_bytes(value):
        return size
    raise PydanticCustomError("size", "Input should be a size such as 8GiB")


Size = Annotated[int, BeforeValidator(_as_bytes, json_schema_input_type=int | str)]
"""Bytes: 67108864, or 64MiB."""


def _budget(value: int | str) -> int | str:
    share = SHARE.fullmatch(value.strip()) if isinstance(value, str) else None
    size = size_in_bytes(value) if isinstance(value, str) else value
    if not (0 < float(share[1]) <= 100 if share else size and size > 0):
        text = "Input should be a share of the device's memory (90%) or a size (24GiB, or bytes)"
        raise PydanticCustomError("budget", text)
    return value


class MemorySection(Section):
    """What a training takes of the device's memory."""

    budget: Annotated[int | str, AfterValidator(_budget)] = "90%"
    """What a training may take of the device's memory: a share of it (90%), or a size (24GiB, or bytes). What is auto
    under train is chosen within it."""
    on_oom: Literal["fit", "fail"] = "fit"
    """What happens when memory runs out in a step or an evaluation. fit: the step is made again from its beginning, in
    micro-batches of half the rows and twice as many of them (the same rows, the same effective batch), then with
    gradient checkpointing; an evaluation goes on with half the rows; every change is shown and stands in the report.
    fail: the run stops and says what helps."""
    offload: Literal["none", "cpu", "disk"] = "none"
    """Where the frozen weights of the decoder wait: each block is brought to the device while the one before it
    is computed. none: they are on the device; cpu: in page-locked memory of the host; disk: in files."""
    offload_folder: str | None = Field(None, min_length=1)
    """Folder in which offload disk puts its files, which go when the training ends. None: output_dir."""
    checkpoints: Literal["auto", "device", "host"] = "auto"
    """Where the inputs of checkpointed blocks wait for the backward pass. device: where they are; host: in page-locked
    memory of the host, copied while other blocks are computed. auto: host, with a GPU."""
    leak_threshold: Annotated[Size, Field(ge=1)] | None = 8 * 2**20
    """Bytes (8388608, 8MiB) in 100 steps from which memory that grows from step to step is told as a leak, with what
    grew. None: no leak is looked for."""

    def budget_bytes(self, total: int) -> int:
        """Of a device of `total` bytes."""
        if isinstance(self.budget, int):
            return min(self.budget, total)
        share = SHARE.fullmatch(self.budget.strip())
        return int(total * float(share[1]) / 100) if share else min(size_in_bytes(self.budget) or total, total)
