"""`qft train` where the recipe comes to several processes: they are started, each with the same command."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from qft.distributed.asked import processes
from qft.distributed.launch import launch
from qft.distributed.world import ranks
from qft.errors import Elsewhere, Interrupted, RunError
from qft.recipe import LoadedRecipe
from qft.run.checkpoint import newest_whole
from qft.run.folder import Run
from qft.run.interrupted import way_on


def launched(loaded: LoadedRecipe, *, resume: bool) -> None:
    """Nothing, if this process trains. Else wait for the processes that do, and raise Elsewhere: the first of them has
    said all. Raises RecipeError, and RunError for a process that was killed."""
    if ranks() is not None:
        return
    count = processes(loaded)
    if count == 1:
        return
    run = Run(Path(loaded.recipe.output_dir))
    try:
        with way_on(run, resume=resume):
            rank, code = launch(_command(), count, loaded.recipe.distributed.max_restarts)
    except Interrupted as interrupted:
        raise Elsewhere(interrupted.exit_code) from None
    if code < 0:
        newest = newest_whole(run.checkpoints)[0]
        way = f"the same command with --resume goes on from {newest}" if newest else "it has saved nothing to resume"
        raise RunError(f"rank {rank} was ended by {signal.Signals(-code).name}; {way}")
    raise Elsewhere(code)


def _command() -> list[str]:
    return [sys.executable, "-m", "qft", *sys.argv[1:]]
