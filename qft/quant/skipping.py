"""Which entry of a list of skipped modules stands for one layer and no other."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["skip_entry"]


def skip_entry(name: str, names: Sequence[str]) -> str:
    """What makes transformers leave exactly this layer of `names` unquantized: its name, ended by $ where it must be.

    transformers matches an entry as a regular expression from the start of a name, up to a dot or the end since 5.24
    and without any end before, and as the end of a name (quantizers_utils.should_convert_module).
    """
    alone = not any(re.match(name, other) or other.endswith(name) for other in names if other != name)
    return name if alone else f"{name}$"
