"""GPTQ (arXiv:2210.17323), AWQ (arXiv:2306.00978) and SmoothQuant (arXiv:2211.10438) by llm-compressor.

It asks for older releases of transformers and compressed-tensors than qft, so it runs in an environment of its own, in
another process: a job goes there as a JSON file, and a folder in the compressed-tensors format comes back.
"""

import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qft.errors import ModelError
from qft.files import write_json

OLDEST = (0, 14)
"""The release whose names llmcompressor_job.py knows, and on which it was tested."""
ASK = "import llmcompressor, importlib.metadata as m; print('version', m.version('llmcompressor'))"
ASK_SECONDS = 300
"""For torch and transformers to be imported once, from a slow disk."""
PART = re.compile(r"\((\d+)/(\d+)\): Calibrating")
BAR = re.compile(r"\d+%\|")


def find_problem(python: str) -> str | None:
    """What keeps the Python at that path from running llm-compressor, and what to do; None if nothing does."""
    install = f"install it there: {python} -m pip install 'llmcompressor>={OLDEST[0]}.{OLDEST[1]}'"
    if not Path(python).is_file():
        return f"{python} does not exist: name the Python of an environment that has llmcompressor"
    try:
        # Isolated: neither PYTHONPATH nor the folder of the job's file may stand in for the environment's packages.
        answer = subprocess.run(  # noqa: S603  # the interpreter that the recipe names
            [python, "-I", "-c", ASK], capture_output=True, text=True, timeout=ASK_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python} cannot be run: {str(error).splitlines()[0]}"
    if answer.returncode:
        return f"{python} cannot import llmcompressor ({_last(answer.stderr.splitlines())}); {install}"
    release = re.search(r"^version (\S+)$", answer.stdout, re.MULTILINE)
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
    running = subprocess.Popen(  # noqa: S603  # the interpreter that the recipe names
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,  # its log
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    with running:
        try:
            said = _follow(running, tell)
        except BaseException:
            running.kill()
            raise
    if running.returncode or not report.is_file():
        raise ModelError(f"calibrate.engine: llmcompressor failed ({running.returncode}): {_last(said)}")
    written: dict[str, Any] = json.loads(report.read_text("utf-8"))
    return written


def _follow(running: subprocess.Popen[str], tell: Callable[[str], None]) -> list[str]:
    """The last lines of its standard error, but for progress bars, of which the parts of the model are last_part."""
    assert running.stderr is not None
    said: list[str] = []
    last_part = ""
    for line in running.stderr:
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
