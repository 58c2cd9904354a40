"""A Python of another environment: whether it has a package, and a script that it runs, a JSON file in and one out."""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qft.errors import ModelError, first_line
from qft.machine.process import Silent, end_group, started

ASK_SECONDS = 300
"""For torch and transformers to be imported once, from a slow disk."""
ASK_LINES = 1000
"""Of an answer; what says more is no Python."""
KEPT_LINES = 20
BAR = re.compile(r"\d+%\|")


@dataclass(frozen=True)
class Package:
    """What a Python must have to run a script of qft's."""

    name: str
    oldest: tuple[int, ...]
    """The release whose names the script knows, and on which it was tested."""
    ask: str
    """Python that imports it and prints `version`, a space and its version."""


def find_problem(python: str, package: Package, heard: Callable[[str], None] = lambda line: None) -> str | None:
    """What keeps the Python at that path from running the package, and what to do; None if nothing does. `heard` gets
    each line that it says."""
    name, oldest = package.name, ".".join(map(str, package.oldest))
    install = f"install it there: {python} -m pip install '{name}>={oldest}'"
    if not Path(python).is_file():
        return f"{python} does not exist: name the Python of an environment that has {name}"
    try:
        # Isolated: neither PYTHONPATH nor the folder of the job's file may stand in for the environment's packages.
        with started([python, "-I", "-c", package.ask], silence=ASK_SECONDS, all_words=True) as asked:
            said = list(islice(asked.lines(), ASK_LINES))
            if len(said) == ASK_LINES:
                end_group(asked.running)
    except Silent:
        return f"{python} cannot be run: it gave no answer in {ASK_SECONDS} s"
    except OSError as error:
        return f"{python} cannot be run: {first_line(error)}"
    for line in said:
        heard(line)
    release = re.search(r"^version (\S+)$", "".join(said), re.MULTILINE)
    if asked.running.returncode and len(said) < ASK_LINES:
        return f"{python} cannot import {name} ({last_words(said)}); {install}"
    if not release:
        return f"{python} is no Python that answers; name the one of an environment that has {name}"
    numbers = tuple(map(int, re.findall(r"\d+", release[1])))
    return f"{python} has {name} {release[1]}, which is too old; {install}" if numbers < package.oldest else None


def run_script(
    command: list[str],
    report: Path,
    *,
    who: str,
    silence: float,
    environment: Mapping[str, str],
    heard: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run a script that writes `report`, in that file's folder, and return what it wrote. `heard` gets each line that
    it says. It may be silent for `silence` seconds. Raises ModelError, which begins with `who`, with the last words of
    what failed."""
    said: list[str] = []
    try:
        with started(command, silence=silence, all_words=True, cwd=report.parent, env=environment) as job:
            for line in job.lines():
                heard(line)
                said = said if BAR.search(line) else [*said[-KEPT_LINES:], line]
    except Silent:
        raise ModelError(f"{who} has said nothing for {silence / 3600:g} h, and was ended") from None
    code = job.running.returncode
    if code or not report.is_file():
        raise ModelError(f"{who} failed ({code}): {last_words(said)}")
    written: dict[str, Any] = json.loads(report.read_text("utf-8"))
    return written


def environment_of(*, on_gpu: bool) -> dict[str, str]:
    """This process's variables, less those that silence progress bars: here they are read. Without `on_gpu`, no GPU is
    seen."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    return own if on_gpu else own | {"CUDA_VISIBLE_DEVICES": ""}


def last_words(lines: list[str]) -> str:
    """The last of them that says something."""
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
