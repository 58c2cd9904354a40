"""GPTQ (arXiv:2210.17323), AWQ (arXiv:2306.00978) and SmoothQuant (arXiv:2211.10438) by llm-compressor.

It asks for older releases of transformers and compressed-tensors than qft, so it runs in an environment of its own, in
another process: a job goes there as a JSON file, and a folder in the compressed-tensors format comes back.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from qft.errors import ModelError, first_line
from qft.files import write_json
from qft.machine.process import Silent, end_group, started

OLDEST = (0, 14)
"""The release whose names llmcompressor_job.py knows, and on which it was tested."""
ASK = "import llmcompressor, importlib.metadata as m; print('version', m.version('llmcompressor'))"
ASK_SECONDS = 300
"""For torch and transformers to be imported once, from a slow disk."""
ASK_LINES = 1000
"""Of an answer; what says more is no Python."""
SILENT_SECONDS = 6 * 3600
"""That the job may say nothing, not even by a progress bar, before it is ended."""
PART = re.compile(r"\((\d+)/(\d+)\): Calibrating")
BAR = re.compile(r"\d+%\|")


def find_problem(python: str) -> str | None:
    """What keeps the Python at that path from running llm-compressor, and what to do; None if nothing does."""
    install = f"install it there: {python} -m pip install 'llmcompressor>={OLDEST[0]}.{OLDEST[1]}'"
    if not Path(python).is_file():
        return f"{python} does not exist: name the Python of an environment that has llmcompressor"
    try:
        # Isolated: neither PYTHONPATH nor the folder of the job's file may stand in for the environment's packages.
        with started([python, "-I", "-c", ASK], silence=ASK_SECONDS, all_words=True) as asked:
            said = list(islice(asked.lines(), ASK_LINES))
            if len(said) == ASK_LINES:
                end_group(asked.running)
    except Silent:
        return f"{python} cannot be run: it gave no answer in {ASK_SECONDS} s"
    except OSError as error:
        return f"{python} cannot be run: {first_line(error)}"
    release = re.search(r"^version (\S+)$", "".join(said), re.MULTILINE)
    if asked.running.returncode and len(said) < ASK_LINES:
        return f"{python} cannot import llmcompressor ({_last(said)}); {install}"
    if not release:
        return f"{python} is no Python that answers; name the one of an environment that has llmcompressor"
    numbers = tuple(map(int, re.findall(r"\d+", release[1])))
    return f"{python} has llmcompressor {release[1]}, which is too old; {install}" if numbers < OLDEST else None


def run_job(
    python: str, job: Mapping[str, Any], folder: Path, tell: Callable[[str], None], *, on_gpu: bool
) -> dict[str, Any]:
    """Do `job` (see llmcompressor_job.py, which sets `report` apart) in `folder`, and return its report. `tell` hears
    of each part of the model that is begun. Raises ModelError with the last words of what failed."""
    report = folder / "report.json"
    write_json(folder / "job.json", {**job, "report": str(report)})
    command = [python, "-I", str(Path(__file__).with_name("llmcompressor_job.py")), str(folder / "job.json")]
    # qft silences progress bars; of these it reads the parts of the model.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    if not on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    try:
        with started(command, silence=SILENT_SECONDS, cwd=folder, env=environment) as job_process:
            said = _follow(job_process.lines(), tell)
    except Silent:
        hours = SILENT_SECONDS / 3600
        raise ModelError(f"calibrate.engine: llmcompressor has said nothing for {hours:g} h, and was ended") from None
    code = job_process.running.returncode
    if code or not report.is_file():
        raise ModelError(f"calibrate.engine: llmcompressor failed ({code}): {_last(said)}")
    written: dict[str, Any] = json.loads(report.read_text("utf-8"))
    return written


def _follow(lines: Iterable[str], tell: Callable[[str], None]) -> list[str]:
    """The last of its lines, but for progress bars, of which the parts of the model are last_part."""
    said: list[str] = []
    last_part = ""
    for line in lines:
        part = PART.search(line)
        if part and part[0] != last_part:
            last_part = part[0]
            tell(f"llm-compressor: part {part[1]} of {part[2]}")
        if not BAR.search(line):
            said = [*said[-20:], line]
    return said


def _last(lines: list[str]) -> str:
    """The last of them that says something."""
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
