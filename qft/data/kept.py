"""Encoded rows of large files, kept for the next command by the content of all that they were made of.

An entry is a folder of Arrow files in the user's cache (QFT_CACHE), read from disk as it is needed. Any of it can be
deleted at any time, and one that is not as it was written is made anew.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qft import __version__
from qft.files import atomic_folder, cache_folder, sha256, write_json

FEWEST = 1000
"""Rows of a file whose encoded rows are kept."""
MAX_BYTES = 4 * 2**30
"""Of all entries; those not used for longest are removed."""
SUMS = "sha256.json"
MADE_BY = ("transformers", "tokenizers", "jinja2", "datasets", "numpy")


def kept(made_of: Mapping[str, Any] | None, make: Callable[[], Dataset]) -> Dataset:
    """What `make` gives, from the entry of what it is `made_of` if there is one; None: it is not kept."""
    folder = cache_folder()
    if folder is None or made_of is None:
        return make()
    entry = folder / "rows" / _name(made_of)
    with suppress(Exception):  # whatever is wrong with an entry, it is made anew
        if _sums(entry) == json.loads((entry / SUMS).read_bytes()):
            os.utime(entry)
            return Dataset.load_from_disk(str(entry))
    made = make()
    with suppress(Exception):  # no room: then it is not kept
        _keep(made, entry)
        _make_room(entry)
    return made


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A name for all that rows become by a tokenizer; None: its code alone knows."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    settings = (
        type(tokenizer).__qualname__,
        tokenizer.chat_template,
        str(tokenizer.special_tokens_map),
        getattr(tokenizer, "split_special_tokens", None),
    )
    return hashlib.sha256(f"{settings}{backend.to_str()}".encode()).hexdigest()


def _name(made_of: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode())
    digest.update(f"{__version__} {[version(package) for package in MADE_BY]}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _keep(rows: Dataset, entry: Path) -> None:
    with atomic_folder(entry) as folder:
        rows.save_to_disk(str(folder))
        write_json(folder / SUMS, _sums(folder))


def _sums(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir() if path.name != SUMS}


def _make_room(newest: Path) -> None:
    total = 0
    for entry in sorted(newest.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True):
        total += sum(path.stat().st_size for path in entry.glob("*"))
        if total > MAX_BYTES and entry != newest:
            shutil.rmtree(entry, ignore_errors=True)
