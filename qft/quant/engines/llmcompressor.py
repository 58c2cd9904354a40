"""GPTQ (arXiv:2210.17323), AWQ (arXiv:2306.00978) and SmoothQuant (arXiv:2211.10438) by llm-compressor.

It asks for older releases of transformers and compressed-tensors than qft, so it runs in an environment of its own, in
another process: a job goes there as a JSON file, and a folder in the compressed-tensors format comes back.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qft.files import write_json
from qft.machine import elsewhere
from qft.machine.elsewhere import Package, environment_of, run_script

ASK = "import llmcompressor, importlib.metadata as m; print('version', m.version('llmcompressor'))"
PACKAGE = Package("llmcompressor", (0, 14), ASK)
SILENT_SECONDS = 6 * 3600
"""That the job may say nothing, not even by a progress bar, before it is ended."""
PART = re.compile(r"\((\d+)/(\d+)\): Calibrating")


def find_problem(python: str) -> str | None:
    """What keeps the Python at that path from running llm-compressor, and what to do; None if nothing does."""
    return elsewhere.find_problem(python, PACKAGE)


def run_job(
    python: str, job: Mapping[str, Any], folder: Path, tell: Callable[[str], None], *, on_gpu: bool
) -> dict[str, Any]:
    """Do `job` (see llmcompressor_job.py, which sets `report` apart) in `folder`, and return its report. `tell` hears
    of each part of the model that is begun. Raises ModelError with the last words of what failed."""
    folder = folder.resolve()
    report = folder / "report.json"
    write_json(folder / "job.json", {**job, "report": str(report)})
    command = [python, "-I", str(Path(__file__).with_name("llmcompressor_job.py")), str(folder / "job.json")]
    who, environment = "calibrate.engine: llmcompressor", environment_of(on_gpu=on_gpu)
    heard = _parts(tell)
    return run_script(command, report, who=who, silence=SILENT_SECONDS, environment=environment, heard=heard)


def _parts(tell: Callable[[str], None]) -> Callable[[str], None]:
    """What reads its progress bars, of which each new part of the model is told."""
    last_part = ""

    def heard(line: str) -> None:
        nonlocal last_part
        part = PART.search(line)
        if part and part[0] != last_part:
            last_part = part[0]
            tell(f"llm-compressor: part {part[1]} of {part[2]}")

    return heard
