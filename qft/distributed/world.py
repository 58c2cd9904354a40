"""The processes of a training, and what they tell each other; alone, a process tells itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from qft.distributed.peers import watched
from qft.errors import Elsewhere, Interrupted, QftError, RunError, first_line

T = TypeVar("T")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
"""Variables that say where the first process listens."""
COUNTED = ("LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables by which accelerate tells that a process is one of several."""
UNTIL_PREPARED = timedelta(days=7)
"""How long processes wait while the first reads and encodes rows; that it ends ends them too."""


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is, by the variables that torchrun and its like set."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Processes on this machine."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def nodes(self) -> int:
        return -(-self.size // self.local_size)


def ranks() -> Ranks | None:
    """None: nobody started this process as one of several. Raises RunError for variables that mean nothing."""
    if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    given = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    given["LOCAL_RANK"] = given["LOCAL_RANK"] or given["RANK"]
    given["LOCAL_WORLD_SIZE"] = given["LOCAL_WORLD_SIZE"] or given["WORLD_SIZE"]
    try:
        found = Ranks(*(int(given[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
    except ValueError:
        found = Ranks(0, 0)
    if not 0 <= found.rank < found.size or not 0 <= found.local_rank < found.local_size:
        told = ", ".join(f"{name}={value}" for name, value in given.items())
        raise RunError(f"{told}: these variables, which torchrun sets, name no process of a training; unset them")
    if found.size > 1 and (missing := [name for name in ADDRESS if not os.environ.get(name)]):
        text = "is not set, and RANK and WORLD_SIZE are: start the processes by torchrun, which sets all, or unset them"
        raise RunError(f"{' and '.join(missing)} {text}")
    return found


@dataclass(frozen=True)
class World:
    """The processes that train together."""

    ranks: Ranks = Ranks()
    group: Any = None
    """Of gloo, for what is no tensor of a GPU; None: there is one process."""

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def size(self) -> int:
        return self.ranks.size

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.ranks.first

    def tell(self, value: T) -> T:
        """What the first process has."""
        told = [value]
        if self.group is not None:
            dist.broadcast_object_list(told, src=0, group=self.group)
        return told[0]

    def gather(self, value: T) -> list[T]:
        """What each process has, in their order."""
        found: list[Any] = [value] * self.size
        if self.group is not None:
            dist.all_gather_object(found, value, group=self.group)
        return found

    def sums(self, values: Sequence[float]) -> list[float]:
        """Of each number, the sum over the processes."""
        if self.group is None:
            return [*values]
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.group)
        return tensor.tolist()

    def added(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, in the place of what this one has; a GPU's host need not wait for it."""
        if self.group is not None:
            dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Until all have come so far."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def first_does(self, work: Callable[[], T]) -> None:
        """Have the first process do it; the others wait, and end if it fails."""
        failed: BaseException | None = None
        if self.first:
            try:
                work()
            except Exception as error:
                failed = error
        code = self.tell(exit_code(failed) if failed else 0)
        if failed:
            raise failed
        if code:
            raise Elsewhere(code)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Those of the items that are this process's."""
        return items[self.rank :: self.size]


ALONE = World()
_worlds: list[World] = [ALONE]


def world() -> World:
    """The one that this process has joined, or it alone."""
    return _worlds[-1]


def exit_code(error: BaseException) -> int:
    """What a shell sees of it."""
    return error.exit_code if isinstance(error, QftError | Interrupted) else 1


@contextmanager
def joined(found: Ranks | None, kind: str, timeout: int) -> Iterator[World]:
    """Be one of the processes that variables tell of, on a GPU of its own (`kind` cuda) or on the CPU; alone, if there
    are none. What fails in one process says so, and in which."""
    if found is None or found.size == 1:
        with _unnamed():
            yield ALONE
        return
    if kind == "cuda":
        torch.cuda.set_device(local_gpu(found))
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    _meet(backend, timedelta(seconds=timeout), found)
    _worlds.append(World(found, dist.new_group(backend="gloo", timeout=UNTIL_PREPARED)))
    try:
        with watched(found.rank, found.size, world().tell):
            with _told_by_rank(found):
                yield world()
            world().wait()
    finally:
        _worlds.pop()
        dist.destroy_process_group()


@contextmanager
def _unnamed() -> Iterator[None]:
    """Without what has accelerate look for other processes, as schedulers and launchers set it for one alone, too."""
    before = {name: os.environ.pop(name) for name in COUNTED if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _meet(backend: str, timeout: timedelta, found: Ranks) -> None:
    try:
        dist.init_process_group(backend, timeout=timeout, rank=found.rank, world_size=found.size)
    except (ValueError, RuntimeError) as error:
        place = ":".join(os.environ[name] for name in ADDRESS)
        does = "listens at" if found.first else "reaches the first at"
        text = f"rank {found.rank} of {found.size} {does} {place} (MASTER_ADDR, MASTER_PORT) in vain"
        raise RunError(f"{text}: {first_line(error)}") from error


def local_gpu(found: Ranks) -> int:
    """Its number among those that this process sees. Raises RunError if there are fewer than processes."""
    seen = torch.cuda.device_count()
    if seen == 1 or found.local_rank < seen:  # a scheduler may show each process its own alone
        return found.local_rank if found.local_rank < seen else 0
    raise RunError(f"{found.local_size} processes were started here, and torch sees {seen} GPUs: start {seen}")


@contextmanager
def _told_by_rank(found: Ranks) -> Iterator[None]:
    try:
        yield
    except Elsewhere:
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error) and "NCCL" not in str(error):
            raise
        text = "another process of the training ended, or was not heard of within distributed.timeout"
        raise RunError(f"rank {found.rank}: {text}; --resume goes on from the newest checkpoint") from error
    except QftError as error:
        if found.first:
            raise
        told = type(error).__new__(type(error))
        told.args = (f"rank {found.rank}: {error}",)
        raise told from error
