"""The header of a GGUF file, walked through without believing it: its counts and lengths are those that it can hold."""

import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qft.errors import ModelError

WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value, by its type in a GGUF file."""
SINGLE = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Of the types that are one value, the format of `struct`."""
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
DEEPEST = 8
"""Arrays within arrays."""


@dataclass
class Header:
    """What of it must be known before anything else reads the file."""

    tensors: int
    values: dict[str, Any] = field(default_factory=dict)
    """Numbers and texts among its values, by their keys."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of its tensors, by their names."""
    end: int = 0
    """Where the header ends, in bytes: after its keys, their values and the table of tensors."""


def header(path: Path) -> Header:
    """Read it. Raises ModelError if it is of another version, or says of more than the file holds."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            order = next((o for o in "<>" if struct.unpack_from(f"{o}I", data, 4)[0] in VERSIONS), None)
            if order is None:
                raise ModelError(f"{path}: is GGUF of another version than {' and '.join(map(str, VERSIONS))}")
            found = _Walker(data, order).walk()
        except (struct.error, KeyError, OverflowError, RecursionError):
            found = None
        if found is None or found.end > len(data):
            raise ModelError(f"{path}: is damaged or cut off: its header says of more than it holds; get it again")
    return found


class _Walker:
    def __init__(self, data: mmap.mmap, order: str) -> None:
        self.data, self.order = data, order

    def _unpack(self, kinds: str, at: int) -> tuple[Any, ...]:
        return struct.unpack_from(self.order + kinds, self.data, at)

    def walk(self) -> Header:
        tensors, pairs = self._unpack("QQ", 8)
        found, at = Header(tensors), 24
        for _ in range(pairs):
            start, at = at + 8, self._string_end(at)
            [kind] = self._unpack("I", at)
            name, at = self._text(start, at), at + 4
            end = self._value_end(at, kind)
            if kind in SINGLE:
                [found.values[name]] = self._unpack(SINGLE[kind], at)
            elif kind == STRING:
                found.values[name] = self._text(at + 8, end)
            at = end
        for _ in range(tensors):
            start, at = at + 8, self._string_end(at)
            [count] = self._unpack("I", at)
            found.shapes[self._text(start, at)] = self._unpack(f"{count}Q", at + 4)[::-1]
            at += 4 + 8 * count + 12
        found.end = at
        return found

    def _text(self, start: int, end: int) -> str:
        return self.data[start:end].decode("utf-8", "replace")

    def _value_end(self, at: int, kind: int, depth: int = 0) -> int:
        if kind == STRING:
            return self._string_end(at)
        if kind != ARRAY:
            return at + WIDTHS[kind]
        kind, count = int(self._unpack("I", at)[0]), int(self._unpack("Q", at + 4)[0])
        at += 12
        if kind in WIDTHS:
            return at + count * WIDTHS[kind]
        if depth == DEEPEST:
            raise OverflowError
        for _ in range(count):
            at = self._value_end(at, kind, depth + 1)
        return at

    def _string_end(self, at: int) -> int:
        return at + 8 + int(self._unpack("Q", at)[0])
