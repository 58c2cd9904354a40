"""One training by several processes: the first reads, encodes, decides and writes; the others are told, and train."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset

from qft.data.prepare import Prepared, batched
from qft.data.stream import open_stream
from qft.distributed.world import exit_code, world
from qft.documents.plan import SourceFacts
from qft.errors import Elsewhere, Interrupted, RunError
from qft.files import scratch_folder
from qft.machine.signals import Signals
from qft.memory.fit import Way
from qft.plan import Plan
from qft.plan.model import require_device
from qft.plan.placement import Placement
from qft.plan.training import plan_one
from qft.progress import View
from qft.recipe import LoadedRecipe
from qft.run.checkpoint import checkpoints_in
from qft.run.folder import Run
from qft.training.ranks import of_rank
from qft.training.recorder import Recorder
from qft.training.session import train_model

ROWS = ("train", "eval", "looked")
"""What of the encoded rows the others are given."""
RESUMABLE = Interrupted("SIGTERM", resumable=True).exit_code


@dataclass(frozen=True)
class Start:
    """What the first process tells the others: they make the same plan of it, without reading rows."""

    loaded: LoadedRecipe
    placement: Placement
    ways: tuple[Way, ...]
    optimizer: str | None
    sources: tuple[SourceFacts, ...]
    checkpoint: Path | None
    rows: Path
    """A folder of the encoded rows, which are mapped and not read into memory."""


class Lead:
    """The first process, beside which others may wait."""

    def __init__(self) -> None:
        self.has_told = world().size == 1

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within it, what fails before the others were told anything ends them too."""
        try:
            yield
        except BaseException as error:
            if not self.has_told:
                world().tell(exit_code(error))
            raise

    @contextmanager
    def told(self, plan: Plan, run: Run) -> Iterator[None]:
        """Within it the others train by the same plan."""
        if self.has_told:
            yield
            return
        with scratch_folder(_made(run.checkpoints), "rows") as rows:
            for part in ROWS:
                if (encoded := getattr(plan.data, part)) is not None:
                    encoded.save_to_disk(str(rows / part))
            self.has_told = True
            own = (plan.model.loaded, plan.placement, plan.ways, plan.optimizer, plan.data.sources)
            world().tell(Start(*own, run.checkpoint, rows))
            yield


def follow(signals: Signals) -> None:
    """What another process does. Raises Elsewhere if the first has ended."""
    start = world().tell(None)
    if not isinstance(start, Start):
        raise Elsewhere(int(start or 1))
    if not start.rows.is_dir():
        raise RunError(f"{start.rows} is not seen here: all nodes must share output_dir")
    plan = _planned(start)
    run = Run(Path(plan.recipe.output_dir), writes=False)
    run.checkpoint = start.checkpoint
    recorder = Recorder(plan, View(), time.perf_counter(), None)
    try:
        train_model(run, recorder, signals)
    except Interrupted as interrupted:  # of which the first process says how to go on
        resumable = checkpoints_in(run.checkpoints) and not interrupted.hard
        raise Elsewhere(RESUMABLE if resumable else interrupted.exit_code) from None
    world().gather(of_rank(recorder))


def _planned(start: Start) -> Plan:
    folders = [start.rows / part for part in ROWS]
    train, held_out, looked = (Dataset.load_from_disk(str(folder)) if folder.is_dir() else None for folder in folders)
    assert train is not None
    assert looked is not None
    shared = batched(train, start.loaded.recipe.data, start.sources)
    rows, device = Prepared(train, held_out, start.sources, shared, looked), require_device(start.loaded)
    plan = plan_one(start.loaded, device, rows, start.placement)
    if plan.recipe.data.streaming:
        stream = open_stream(plan.model.rows_for(plan.recipe.data), plan.model.tokenizer, plan.recipe.seed)
        plan = replace(plan, data=replace(rows, stream=stream))
    return replace(plan, ways=start.ways, optimizer=start.optimizer)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
