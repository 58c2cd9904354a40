"""What lies in a checkpoint of the Trainer, and whether it is whole: read without torch.

qft_checkpoint.json, written last, has the hashes of all that the rest of a training comes of."""

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qft.documents.recorded import lies_beside
from qft.documents.state import CheckpointHashes
from qft.files import files_of, remove_folder, sha256, verdict, write_text

STATE = "qft_state.json"
"""What the run had measured by then: documents.state.TrainingState."""
TRAINER_STATE = "trainer_state.json"
"""Which the Trainer writes last."""
HASHES = "qft_checkpoint.json"
INITIAL = "initial-adapter"
"""Beside the checkpoints, where the adapter's initialisation changed the base."""
NAME = re.compile(r"checkpoint-\d+")
WRITTEN = (".pt", ".pth", ".distcp", ".metadata")
"""Endings of what the Trainer writes and no loader of models takes."""
PARTS = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
WORDS = {"changed": "is not what was written", "missing": "is missing", "unreadable": "cannot be read"}


def checkpoints_in(folder: Path) -> list[Path]:
    """Those that were written to their end, damaged ones among them, by their steps. Raises OSError for a folder that
    cannot be read: it may hold some."""
    found = (path for path in (folder.iterdir() if folder.is_dir() else ()) if NAME.fullmatch(path.name))
    return sorted((path for path in found if (path / TRAINER_STATE).exists() or (path / HASHES).exists()), key=step_of)


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The last checkpoint from which a training can go on, and what is to be told of it and of those behind it."""
    told: list[str] = []
    for checkpoint in reversed(checkpoints_in(folder)):
        wrong = damage(checkpoint)
        if not wrong and not (checkpoint / HASHES).exists():
            told.append(f"{checkpoint} has no hashes of its files, which can be read: it is taken as it is")
        if not wrong:
            return checkpoint, told
        told.append(f"{checkpoint} is damaged, and not taken: {', '.join(wrong)}")
    return None, told


def damage(checkpoint: Path, *, weights_only: bool = False) -> list[str]:
    """What is wrong with its files, by their hashes; without those, as far as it shows when they are read."""
    try:
        hashes = CheckpointHashes.model_validate_json((checkpoint / HASHES).read_bytes()).files
        hashes[TRAINER_STATE]
    except FileNotFoundError:
        return [*_weights_unread(checkpoint), *([] if weights_only else _state_unread(checkpoint))]
    except (OSError, ValueError, KeyError):
        return [f"{HASHES} cannot be read"]
    asked = {name: digest for name, digest in hashes.items() if not weights_only or name.endswith(".safetensors")}
    found = ((name, verdict(checkpoint / name, digest)) for name, digest in asked.items())
    return [f"{name} {WORDS[kind]}" for name, kind in found if kind != "whole"]


def seal(checkpoint: Path, *needed: Path) -> None:
    """Bring all of a finished checkpoint to the disk and write its hashes, and those of folders that it needs."""
    paths = [path for folder in (checkpoint, *needed) for path in files_of(folder).values()]
    for path in paths:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    hashes = CheckpointHashes(files={os.path.relpath(path, checkpoint): sha256(path) for path in paths})
    write_text(checkpoint / HASHES, hashes.model_dump_json(indent=2) + "\n")


def beside_all(checkpoints: Path) -> Callable[[str], bool]:
    """Whether a file, by its path in the folder of checkpoints, is no part of them: a note, say, or a copy of one."""
    found = [path for path in checkpoints.glob("*") if NAME.fullmatch(path.name) or path.name == INITIAL]
    stays = {path.name: beside(path) for path in found}

    def is_beside(name: str) -> bool:
        top, _, rest = name.partition("/")
        return not rest or top not in stays or stays[top](rest)

    return is_beside


def beside(checkpoint: Path) -> Callable[[str], bool]:
    """The same of one, by the file's path in it."""
    if made := _sealed(checkpoint):
        return lambda name: name not in made
    return lambda name: lies_beside(name) and not name.endswith(WRITTEN)


def _sealed(checkpoint: Path) -> set[str]:
    """The files of a checkpoint that was finished, by their paths in it."""
    with suppress(OSError, ValueError):
        return {HASHES, *CheckpointHashes.model_validate_json((checkpoint / HASHES).read_bytes()).files}
    return set()


def discard(checkpoint: Path) -> None:
    """Remove it, but for what is no part of it; what a kill leaves of it is no checkpoint."""
    stays = beside(checkpoint)
    for name in (HASHES, TRAINER_STATE):
        (checkpoint / name).unlink(missing_ok=True)
    remove_folder(checkpoint, stays)


def rotate(newest: Path, limit: int | None, best: Path | None) -> None:
    """Keep `limit` checkpoints up to the newest, which is whole, and the best one; None: all. Later ones are of a part
    of the run that could not be gone on from."""
    if limit:
        found = checkpoints_in(newest.parent)
        kept = [path for path in found if step_of(path) <= step_of(newest)][-limit:]
        for checkpoint in set(found) - {*kept, best}:
            discard(checkpoint)


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps made by the time of a checkpoint; 0 without one."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def waited(checkpoint: Path) -> int:
    """Evaluations since the best one, as early stopping counted them; 0 if it did not."""
    stopping = _state(checkpoint).get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
    return int(stopping.get("attributes", {}).get("early_stopping_patience_counter", 0))


def best_of(checkpoint: Path) -> Path | None:
    """The checkpoint that had the lowest held-out loss so far, beside this one, wherever the run lay then."""
    best = _state(checkpoint).get("best_model_checkpoint")
    return checkpoint.with_name(Path(best).name) if best else None


def best_problem(best: Path) -> str | None:
    """Why the weights of the best checkpoint so far cannot be taken; None: they can."""
    wrong = damage(best, weights_only=True) if best.exists() else ["is missing"]
    return (
        f"{best}, the best checkpoint so far: {', '.join(wrong)}; restore it, or set this to false" if wrong else None
    )


def is_over(checkpoint: Path, steps: int, patience: int | None) -> bool:
    """Whether a training of `steps` that stops early after `patience` evaluations has nothing more to do."""
    return step_of(checkpoint) >= steps or (patience is not None and waited(checkpoint) >= patience)


def _state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / TRAINER_STATE).read_text("utf-8"))
    return state


def _state_unread(checkpoint: Path) -> Iterator[str]:
    try:
        if _state(checkpoint)["global_step"] != step_of(checkpoint):
            yield f"{TRAINER_STATE} is of another step"
    except (OSError, ValueError, KeyError, TypeError):
        yield f"{TRAINER_STATE} cannot be read"
    for name in PARTS:
        try:
            with zipfile.ZipFile(checkpoint / name) as parts:
                bad = parts.testzip()  # torch writes a checksum for each part
        except (OSError, zipfile.BadZipFile):
            bad = name
        if bad:
            yield f"{name} {WORDS['unreadable' if (checkpoint / name).exists() else 'missing']}"


def _weights_unread(checkpoint: Path) -> Iterator[str]:
    names = {path.name for path in checkpoint.glob("*.safetensors")}
    for index in checkpoint.glob("*.safetensors.index.json"):
        try:
            names |= set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            yield f"{index.name} cannot be read"
    for name in sorted(names):
        try:
            with safe_open(checkpoint / name, framework="np"):
                pass
        except FileNotFoundError:
            yield f"{name} is missing"
        except (OSError, SafetensorError):
            yield f"{name} cannot be read"
    if not names:
        yield "its weights are missing"
