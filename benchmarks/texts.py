"""Text that every machine with torch has: docstrings of Python's standard library, torch, numpy and sympy."""

import ast
import random
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

SHORTEST, LONGEST = 300, 1800
"""Characters of a docstring that is taken, and of a text."""
PACKAGES = ("torch", "numpy", "sympy")
NO_CODE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


def library_texts() -> dict[str, list[str]]:
    """`train` and `eval`, in a drawn order: docstrings of a file joined to some LONGEST characters, each of them once,
    and each eighth file held out."""
    files, seen, found = [path for root in _roots() for path in _code(root)], set[str](), []
    with ProcessPoolExecutor() as pool:
        for texts in pool.map(docstrings, files, chunksize=64):
            own = [text for text in dict.fromkeys(texts) if text not in seen]
            seen.update(own)
            found.append(own)
    draw = random.Random(0)
    draw.shuffle(found)
    parts = {"eval": found[::8], "train": [texts for i, texts in enumerate(found) if i % 8]}
    joined = {part: [text for texts in files for text in _joined(texts)] for part, files in parts.items()}
    for texts in joined.values():
        draw.shuffle(texts)
    return joined


def docstrings(path: Path) -> list[str]:
    """The long ones of a file."""
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, ValueError):
        return []
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text and len(text) >= SHORTEST]


def _roots() -> Iterator[Path]:
    yield Path(sysconfig.get_paths()["stdlib"])
    for name in PACKAGES:
        if (spec := find_spec(name)) and spec.origin:
            yield Path(spec.origin).parent


def _code(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.rglob("*.py")) if not NO_CODE & set(path.relative_to(root).parts))


def _joined(texts: list[str]) -> Iterator[str]:
    text = ""
    for each in texts:
        text += f"{each[:LONGEST]}\n\n"
        if len(text) > LONGEST * 2 // 3:
            yield text[:LONGEST]
            text = ""
    if text:
        yield text
