"""Good files made bad by a seed: as bytes, as JSON, and one of a folder's files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

ODD: list[Any] = [
    None, True, "", [], {}, 0, -1, 1.5, 10**12, -(10**30), 1e308, "x" * 3000, "\x1b[31m", "nul\0l", "é漢\ud800",
    [[[[]]]], {"a": {"b": []}}, "/dev/zero", "../..", "[bold]", "{{ 1 / 0 }}", "{% for",
]  # fmt: skip
"""Values that nobody asked for."""


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """Cut, flipped, doubled, filled with something else, or emptied."""
    size = len(data)
    start = draw.choice([draw.randrange(size + 1), draw.randrange(min(size, 64) + 1)])
    end = min(size, start + draw.choice([1, 2, 8, 64, size]))
    match draw.choice(["cut", "flip", "drop", "double", "noise", "digits", "empty"]):
        case "cut":
            return data[:start]
        case "flip":
            flipped = bytearray(data)
            for _ in range(draw.choice([1, 1, 3, 20])):
                flipped[draw.randrange(size)] ^= 1 << draw.randrange(8)
            return bytes(flipped)
        case "drop":
            return data[:start] + data[end:]
        case "double":
            return data[:end] + data[start:end] + data[end:]
        case "noise":
            return data[:start] + draw.randbytes(end - start) + data[end:]
        case "digits":
            return data.replace(draw.choice([b"1", b"2", b"64", b"4"]), draw.choice([b"9" * 12, b"-1", b"0"]), 1)
    return b""


def mutated_json(value: Any, draw: random.Random) -> Any:
    """The value with one part of it replaced, removed, renamed, doubled or nested."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name = draw.choice(list(value))
        match draw.choice(["within", "within", "within", "remove", "rename", "replace"]):
            case "within":
                return value | {name: mutated_json(value[name], draw)}
            case "remove":
                return {key: inner for key, inner in value.items() if key != name}
            case "rename":
                return {draw.choice([key, str(key) + "x"]) if key == name else key: v for key, v in value.items()}
            case _:
                return value | {name: draw.choice(ODD)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        number = draw.randrange(len(value))
        changed = draw.choice([[mutated_json(value[number], draw)], [], [value[number]] * 2, [draw.choice(ODD)]])
        return [*value[:number], *changed, *value[number + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.5:
        return draw.choice([value + 1, -value, value * 1000, value * 10**9, float(value)])
    return draw.choice([*ODD, [value], {"value": value}])


def spoil(path: Path, draw: random.Random) -> None:
    """Make a file bad, by what it holds if that is JSON, and else, or now and then, by its bytes."""
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl") and draw.random() < 0.7:
        lines = data.splitlines() if path.suffix == ".jsonl" else [data]
        number = draw.randrange(len(lines))
        value = json.loads(lines[number])
        for _ in range(draw.choice([1, 1, 1, 3])):
            value = mutated_json(value, draw)
        lines[number] = json.dumps(value).encode()
        path.write_bytes(b"\n".join(lines))
    else:
        path.write_bytes(mutated_bytes(data, draw) if data else draw.randbytes(9))


def spoil_one(folder: Path, draw: random.Random, *, but: tuple[str, ...] = ()) -> Path:
    """Make one file below the folder bad, or take it away, or put a folder in its place."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in but)
    path = draw.choice(files)
    kind = draw.random()
    if kind < 0.85:
        spoil(path, draw)
    else:
        path.unlink()
        if kind > 0.95:
            path.mkdir()
    return path
