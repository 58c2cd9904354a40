"""What a process that prepares batches fails at, told as if it were this one."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from qft.errors import OutOfMemoryError, first_line

CAUGHT = re.compile(r"Caught (\w+) in DataLoader worker process \d+\.\nOriginal .*\n(?:\w+\.)*\1: (.*)", re.DOTALL)
"""What torch makes of it: an exception of that class, whose text is its traceback."""
OF_SYSTEM = re.compile(r"\[Errno (\d+)\] (.*?): '(.*)'", re.DOTALL)
"""The system's number, what it says, and the file."""
ENDED = re.compile(r"DataLoader worker .*(killed by signal|exited unexpectedly)")
PAUSE = 0.2
KILLED = (
    "a process that prepares batches was ended from outside, as systems do that run out of memory: set fewer "
    "train.dataloader_num_workers, or give the machine more memory; from a checkpoint, --resume goes on"
)


@contextmanager
def workers_heard() -> Iterator[None]:
    """Within it, what is raised in a worker is raised here with its own text, and its sudden end an OutOfMemoryError:
    of that this process hears by a signal, or by a pipe that breaks."""
    try:
        yield
    except (ConnectionError, EOFError) as error:
        with suppress(RuntimeError):  # which torch raises where the signal comes, and that may be later
            time.sleep(PAUSE)
        raise OutOfMemoryError(f"{KILLED} ({first_line(error)})") from error
    except Exception as error:
        if isinstance(error, RuntimeError) and ENDED.search(str(error)):
            raise OutOfMemoryError(f"{KILLED} ({first_line(error)})") from error
        if told := _original(error):
            raise told from error
        raise


def _original(error: Exception) -> Exception | None:
    """As it was raised in the worker; None for what was not."""
    match = CAUGHT.fullmatch(str(error).strip())
    if match is None:
        return None
    if isinstance(error, OSError) and (said := OF_SYSTEM.fullmatch(match[2])):
        return OSError(int(said[1]), said[2], said[3])
    return type(error)(match[2])
