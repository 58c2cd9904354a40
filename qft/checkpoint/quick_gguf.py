"""GGUF files, as transformers reads them: quick, and with the tokenizer that they describe."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from qft.checkpoint.gguf_tokens import tokenizer_as_described


@contextmanager
def quick_gguf() -> Iterator[None]:
    """Within it gguf makes the names of an architecture's tensors once, where transformers asks for them once a
    module, and slices plain arrays: each slice of a memory map costs what makes one. That was two thirds of the time
    that a file takes to load. And an older transformers makes the tokenizer that the file describes. Without the
    package, transformers says so."""
    try:
        import gguf
    except ImportError:
        yield
        return

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        def _build_fields(self, *arguments: Any) -> Any:
            self.data: Any = self.data.view(np.ndarray)
            return super()._build_fields(*arguments)

    before = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = Reader, functools.cache(gguf.get_tensor_name_map)
    try:
        with tokenizer_as_described():
            yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = before
