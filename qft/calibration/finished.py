"""What finished blocks have left on disk, and whether it is what was written: a calibration that goes on takes them as
they are, and nothing that it measures would tell that one was damaged since."""

import json
from collections.abc import Iterable
from pathlib import Path

from qft.files import sha256, verdict, write_json


def record(folder: Path, number: int, paths: Iterable[Path]) -> None:
    """Keep the hashes of what a block has left; its hidden states among it. Reads all of that once."""
    write_json(_record(folder, number), {path.name: sha256(path) for path in paths})


def damage(folder: Path, done: int) -> list[str]:
    """Files of the first `done` blocks that are not what was written; of hidden states those behind the last alone are
    kept. A block without hashes, of an older qft, is taken as it is."""
    wrong = list[str]()
    for number in range(done):
        path = _record(folder, number)
        try:
            hashes = dict(json.loads(path.read_text("utf-8")))
        except FileNotFoundError:
            continue
        except (ValueError, TypeError):
            wrong.append(path.name)
            continue
        kept = (name for name in hashes if number + 1 == done or not name.startswith("streams-"))
        wrong += [name for name in kept if verdict(folder / name, hashes[name]) != "whole"]
    return wrong


def _record(folder: Path, number: int) -> Path:
    return folder / f"done-{number:05}.json"
