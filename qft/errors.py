"""Everything qft refuses to do, and the exit code a shell sees.

    QftError                 1   something qft cannot do; the base of all below
    ├─ RecipeError           2   the recipe is wrong, or asks what this machine cannot do
    ├─ MissingError          3   a file, a dataset or a model is not there
    ├─ GateError             4   the work was done and its result was not accepted
    │  └─ DamagedError       4   a file does not hash to what was recorded of it
    ├─ DataError             5   a row or a template cannot be trained on
    ├─ ModelError            6   the model cannot be loaded or trained as asked
    ├─ RunError              7   the run folder forbids it: not empty, not resumable, disk full
    │  └─ BusyError         10   another process is at work in the folder: try again once it is done
    ├─ NonFiniteError        8   the loss or a gradient became NaN or infinite
    ├─ OutOfMemoryError      9   the device ran out of memory
    ├─ ServerError          11   a server (--url) is not there, or does not answer as asked
    └─ InternalError        70   nobody has foreseen it: a fault of qft

    Elsewhere                    another process of the same training failed, and says why; its exit code

    Interrupted             75   a signal stopped a run, and --resume goes on from what it has saved (EX_TEMPFAIL)
                     128 + signal   it stopped a run that has saved nothing to resume from: 130, 143 or 129

The message says what is wrong, where (`file:line` when there is one) and what to do. The command line prints it alone;
`--debug` adds the traceback.
"""

import signal as signals
from collections.abc import Iterable, Iterator


class QftError(Exception):
    """Base of every error that qft raises on purpose."""

    exit_code = 1


class RecipeError(QftError):
    """One or more problems of a recipe, all of them found at once."""

    exit_code = 2

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class MissingError(QftError):
    exit_code = 3


class GateError(QftError):
    exit_code = 4


class DamagedError(GateError):
    """Its message names the file and the way out."""


class DataError(QftError):
    exit_code = 5


class ModelError(QftError):
    exit_code = 6


class RunError(QftError):
    exit_code = 7


class BusyError(RunError):
    """A living process holds the folder."""

    exit_code = 10


class NonFiniteError(QftError):
    exit_code = 8


class OutOfMemoryError(QftError):
    exit_code = 9


class ServerError(QftError):
    exit_code = 11

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status
        """Of HTTP, if it gave one."""


class InternalError(QftError):
    """What the command line makes of an exception that nobody has foreseen."""

    exit_code = 70


class Elsewhere(QftError):
    """Nothing is left to say in this process."""

    def __init__(self, code: int) -> None:
        self.exit_code = code
        super().__init__("another process of the training ended it")


def causes(error: BaseException, *, in_context: bool = False) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on to the first; `in_context`: what was being handled, too."""
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        yield following
        context = following.__context__ if in_context and not following.__suppress_context__ else None
        following = following.__cause__ or context


class Interrupted(KeyboardInterrupt):
    """A signal asked a run to stop. No error, so nothing that handles those takes it for one."""

    def __init__(self, signal: str, text: str = "", *, resumable: bool = False, hard: bool = False) -> None:
        self.signal, self.resumable, self.hard = signal, resumable, hard
        """Its name; whether --resume will go on; whether it is the second, which ends at once."""
        super().__init__(text or f"interrupted by {signal}")

    @property
    def exit_code(self) -> int:
        return 75 if self.resumable else 128 + signals.Signals[self.signal]


def is_failure(error: BaseException) -> bool:
    """Whether it is one of the program's. A library in Rust that gives up raises pyo3's PanicException, of which each
    has its own, and which is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """What a library's error says first; its kind if it says nothing."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
