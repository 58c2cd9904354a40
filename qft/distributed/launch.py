"""Processes that train together, started, and started again if that is asked, by torch's own elastic launcher."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import uuid
from collections.abc import Sequence
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qft.errors import Interrupted
from qft.machine.signals import SIGNALS

PATIENCE = 600
"""Seconds that processes have to finish a step and write a checkpoint, once a signal has come."""


def launch(command: Sequence[str], processes: int, restarts: int) -> tuple[int, int]:
    """Run the command in so many processes of this machine, and wait for them. Returns which rank failed first, and
    with what code (of a signal, its negative number); (0, 0) if none did. Raises Interrupted for a signal, which all of
    them have heard."""
    known = {field.name for field in dataclasses.fields(LaunchConfig)}
    heard = [number.name for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup's stays so
    wanted = {"shutdown_timeout": PATIENCE, "signals_to_handle": ",".join([*heard, "SIGQUIT"])}
    settings: Any = {name: value for name, value in wanted.items() if name in known}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.2,
        **settings,
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    logging.disable(logging.ERROR)  # what fails says so itself
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return rank, failure.exitcode
    except SignalException as error:
        raise Interrupted(signal.Signals(error.sigval).name) from None
    finally:
        logging.disable(logging.NOTSET)
    return 0, 0


def restarted() -> bool:
    """Whether the launcher has started this process again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0
