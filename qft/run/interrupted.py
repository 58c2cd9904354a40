"""How to go on with a run that a signal stopped."""

from collections.abc import Iterator
from contextlib import contextmanager

from qft.errors import Interrupted
from qft.run.checkpoint import checkpoints_in, step_of
from qft.run.folder import Run


@contextmanager
def way_on(run: Run, *, resume: bool) -> Iterator[None]:
    """Around a command on a run: what stops it says how to go on, if the command has begun to write."""
    before = run.manifest()
    try:
        yield
    except Interrupted as interrupted:
        begun = resume or run.manifest() != before
        found = [f"from step {step_of(path)}" for path in checkpoints_in(run.checkpoints)[-1:]]
        found += ["behind the last finished block"] if run.work.is_dir() and any(run.work.iterdir()) else []
        text = f"interrupted by {interrupted.signal}"
        if begun and found:
            text = f"{run.folder}: {text}; the same command with --resume goes on {found[0]}"
        elif begun:
            text = f"{run.folder}: {text} before anything was saved; start anew with --overwrite"
        resumable = bool(begun and found) and not interrupted.hard
        raise Interrupted(interrupted.signal, text, resumable=resumable, hard=interrupted.hard) from None
