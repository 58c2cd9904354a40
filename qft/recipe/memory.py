"""What the memory section of a recipe asks."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from qft.recipe.training import Section

UNITS = {"": 0, "B": 0, "KiB": 1, "MiB": 2, "GiB": 3, "TiB": 4}


def _as_bytes(value: Any) -> Any:
    """`24GiB` as its bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]iB|B|)\s*", value) if isinstance(value, str) else None
    return round(float(found[1]) * 1024 ** UNITS[found[2]]) if found else value


Size = Annotated[int, BeforeValidator(_as_bytes, json_schema_input_type=int | str)]
"""Bytes: 67108864, or 64MiB."""


class MemorySection(Section):
    """What is done about memory."""

    leak_threshold: Annotated[Size, Field(ge=1)] | None = 8 * 2**20
    """Bytes (8388608, 8MiB) in 100 steps from which memory that grows from step to step is told as a leak, with what
    grew. None: no leak is looked for."""
