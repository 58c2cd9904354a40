"""Exceptions of libraries and of the system -> one message each; what nobody has foreseen leaves its traceback in a
file."""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from qft.cli.shell import NAMES
from qft.disk import REFUSALS, refusal
from qft.errors import (
    InternalError,
    MissingError,
    ModelError,
    NonFiniteError,
    OutOfMemoryError,
    QftError,
    RunError,
    causes,
    first_line,
)

ROOT = Path(__file__).parents[1]
DAMAGED = "a file of weights or state is damaged or cut off; copy or download it again"
BARE = "Python was started without docstrings, which libraries read; unset PYTHONOPTIMIZE, or leave -OO away"
NOT_FINITE = (
    "a figure of the result is NaN or infinite, and was not written: the model is so, or becomes so on these rows; "
    "look at both, or lower train.learning_rate"
)
UNREACHABLE = "the hub cannot be reached; try again, or set HF_HUB_OFFLINE=1 to use what is on this machine"
LIBRARIES: dict[str, tuple[type[QftError], str]] = {
    "torch.OutOfMemoryError": (OutOfMemoryError, "the device has no memory left"),
    "torch.cuda.OutOfMemoryError": (OutOfMemoryError, "the device has no memory left"),
    "builtins.MemoryError": (OutOfMemoryError, "this machine has no memory left"),
    "pyarrow.lib.ArrowMemoryError": (OutOfMemoryError, "this machine has no memory left"),
    "safetensors_rust.SafetensorError": (ModelError, DAMAGED),
    "safetensors._safetensors_rust.SafetensorError": (ModelError, DAMAGED),
    "_pickle.UnpicklingError": (RunError, DAMAGED),
    "zipfile.BadZipFile": (RunError, DAMAGED),
    "huggingface_hub.errors.HfHubHTTPError": (MissingError, UNREACHABLE),
    "huggingface_hub.errors.OfflineModeIsEnabled": (MissingError, UNREACHABLE),
    "httpx.TransportError": (MissingError, UNREACHABLE),
    "httpx2.TransportError": (MissingError, UNREACHABLE),
    "requests.exceptions.ConnectionError": (MissingError, UNREACHABLE),
}
"""By the full name of a class, so that no library is imported for it: what it becomes, and what to say."""
KILLED = (
    "a process that encodes rows was ended from outside, as systems do that run out of memory: set fewer "
    "data.num_proc, or give the machine more"
)
TEXTS: list[tuple[str, type[QftError], str]] = [
    (r"can't allocate memory", OutOfMemoryError, "this machine has no memory left"),
    (r"subprocesses has abruptly died", OutOfMemoryError, KILLED),
    (r"DataLoader worker .*killed by signal", OutOfMemoryError, "this machine has no memory left, it seems"),
    (r"Too many open files", RunError, REFUSALS["EMFILE"]),
    (r"TMPDIR is set to", RunError, "temporary files cannot be written"),
]
"""What a RuntimeError, or an OSError without a number, says by which it is known, as for the classes."""
KINDS = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, IsADirectoryError: errno.EISDIR}
"""Numbers of the system's errors that libraries raise without one."""
ABSENT = ("ENOENT", "ENXIO", "ENODEV")


def explained(error: BaseException) -> QftError | None:
    """The message that a known failure of the system or of a library deserves; None for others."""
    for cause in causes(error):
        if isinstance(cause, QftError):
            return cause
        for name in (f"{kind.__module__}.{kind.__qualname__}" for kind in type(cause).__mro__):
            if name in LIBRARIES:
                kind, text = LIBRARIES[name]
                return kind(f"{text}: {first_line(cause)}" if str(cause) else text)
        if told := _by_text(cause) or _of_environment(cause):
            return told
        if isinstance(cause, ValueError) and "not JSON compliant" in str(cause):
            return NonFiniteError(NOT_FINITE)
        if isinstance(cause, OSError) and cause.errno:
            return _of_system(cause)
        if isinstance(cause, OSError) and type(cause) in KINDS:
            return _of_system(type(cause)(KINDS[type(cause)], first_line(cause)))
    return None


def _by_text(error: BaseException) -> QftError | None:
    if isinstance(error, RuntimeError) or (isinstance(error, OSError) and not error.errno):
        for pattern, kind, text in TEXTS:
            if re.search(pattern, str(error)):
                return kind(f"{text}: {first_line(error)}")
    return None


def _of_environment(error: BaseException) -> QftError | None:
    """A variable with a value that a library cannot read, by the line that failed; or Python without docstrings."""
    if sys.flags.optimize > 1 and "docstring" in str(error):
        return RunError(f"{BARE}: {first_line(error)}")
    frames = traceback.extract_tb(error.__traceback__) if isinstance(error, ValueError) else []
    for name in re.findall(r"""["'](\w+)["']""", (frames[-1].line or "") if frames else ""):
        value = os.environ.get(name)
        if value and repr(value) in str(error):
            return RunError(
                f"the environment variable {name} has a value that {_library(frames[-1].filename)} cannot read: "
                f"{first_line(error)}; unset it, or give it another"
            )
    return None


def _library(file: str) -> str:
    """What a file belongs to."""
    _, found, within = file.replace(os.sep, "/").rpartition("/site-packages/")
    return within.partition("/")[0] if found else Path(file).name


def _of_system(error: OSError) -> QftError:
    name = errno.errorcode.get(error.errno or 0)
    if name == "ENOMEM":
        return OutOfMemoryError(f"this machine has no memory left: {refusal(error)}")
    if name in ABSENT:
        return MissingError(refusal(error))
    where = "" if error.filename else f" (temporary files go to {tempfile.gettempdir()}; TMPDIR names another place)"
    return RunError(refusal(error) + (where if name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES") else ""))


def unforeseen(error: BaseException) -> QftError:
    """One line for a fault of qft, or of the model's own code, whose traceback is written to a file."""
    said = f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
    if place := _in_model(error):
        return ModelError(f"the model's own code fails on this ({place}): {said}; {_kept(error)}")
    return InternalError(f"{_doing(error)} failed in a way that nobody has foreseen: {said}; {_kept(error)}")


def _in_model(error: BaseException) -> str:
    """Where in a model's own code it was, beneath all of qft; empty if it was not."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT):
            break
        if path.parent.parent.parts[-2:] == ("transformers", "models") or "transformers_modules" in path.parts:
            return f"{path.name}:{frame.lineno}"
    return ""


def _doing(error: BaseException) -> str:
    """The command, and the last function of qft that was at work for it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(ROOT)]
    ours = [f for f in frames if Path(f.filename).name != "shell.py"]
    if not ours:
        return "qft"
    first, last = ours[0], ours[-1]
    group = "models " if Path(first.filename).name == "models.py" else ""
    place = Path(last.filename).relative_to(ROOT)
    return f"`qft {group}{NAMES.get(first.name, first.name)}`, in {last.name} ({place}:{last.lineno}),"


def _kept(error: BaseException) -> str:
    """Where the traceback is."""
    text = "".join(traceback.format_exception(error))
    problem = ""
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=folder, prefix="traceback-", suffix=".txt")
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(text)
        except OSError as failure:
            problem = refusal(failure, folder)
        else:
            return f"its traceback, for a report of the fault, is in {name}"
    return f"its traceback could not be written ({problem}); --debug shows it"


def _folders() -> Iterator[Path]:
    kept = os.environ.get("QFT_CACHE")
    if kept and kept != "off":
        yield Path(kept)
    yield Path(tempfile.gettempdir())
