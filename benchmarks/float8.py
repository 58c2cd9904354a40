"""Whether training with train.matmul fp8 learns what 16 bits learn: loss curves on a real model and real text.

    python benchmarks/float8.py [--recipe recipes/compare-ptq-qat.yaml] [--steps 200] [--seeds 3] [--folder runs/float8]

trains RECIPE's model, on an nf4 base and in 16 bits, on text that every machine with torch has (texts.py), whole files
held out: with 16-bit products from each seed, and in float8 from all but the last. The rows come in the same order, so
that seeds differ by the draw of the adapters alone. For each base: how far float8's curve (means of ten steps, and the
loss on held-out rows) lies from that of 16 bits with its seed, and how far those of two seeds lie from each other. One
line a training as it ends, and one a base; float8 holds where none of its distances is larger than the largest between
seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from texts import library_texts

from qft.recipe import load

BASES: dict[str, Any] = {"nf4": {"preset": "finetune"}, "16-bit": {"mode": "none"}}
ROWS, HELD_OUT, MEAN = 8, 128, 10
"""Rows of a step, held-out rows, and steps of which a point of a curve is the mean."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/compare-ptq-qat.yaml"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="two or more")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=[*BASES])
    parser.add_argument("--folder", type=Path, default=Path("runs/float8"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    texts = library_texts()
    for part, count in (("train", ROWS * options.steps), ("eval", HELD_OUT)):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[part][:count])
        (options.folder / f"{part}.jsonl").write_text("".join(lines), "utf-8")
    arms = [("16bit", seed) for seed in range(options.seeds)] + [("fp8", seed) for seed in range(options.seeds - 1)]
    asked = [(base, *arm) for base in options.bases for arm in arms]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = dict(zip(asked, pool.map(lambda arm: learnt(options, *arm), asked), strict=True))
    for base in options.bases:
        print(json.dumps({"base": base, **verdict({arm[1:]: own for arm, own in found.items() if arm[0] == base})}))


def learnt(options: argparse.Namespace, base: str, matmul: str, seed: int) -> dict[str, Any]:
    """The report of one training."""
    name, folder = f"{base}-{matmul}-{seed}", options.folder.resolve()
    values = copy.deepcopy(load(options.recipe).tree.values)
    values |= {"quant": BASES[base], "seed": seed, "output_dir": str(folder / name), "eval": {}}
    values["data"] = {part: str(folder / f"{part}.jsonl") for part in ("train", "eval")}
    values["data"] |= {"max_length": 512, "format": "text", "on_too_long": "truncate"}
    values["train"] = {
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": [],
        "matmul": matmul,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(values), "utf-8")
    command = [sys.executable, "-m", "qft", "train", str(path), "--json", "--overwrite"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    points = [round(float(point), 4) for point in curve(report)]
    print(json.dumps({"ran": name, "seconds": round(report["wall_seconds"]), "curve": points}), flush=True)
    return report


def curve(report: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Means of MEAN steps each, and the held-out loss last."""
    losses = np.array([loss for _, loss, *_ in report["loss"]["history"]])
    return np.append(losses.reshape(-1, MEAN).mean(1), np.log(report["eval"]["after"]["perplexity"]))


def verdict(reports: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """Distances of curves, largest and mean, in nats a token."""
    curves = {arm: curve(report) for arm, report in reports.items()}
    seeds = {seed for matmul, seed in curves if matmul == "16bit"}
    between = [np.abs(curves["16bit", a] - curves["16bit", b]) for a, b in combinations(sorted(seeds), 2)]
    apart = [np.abs(curves["fp8", seed] - curves["16bit", seed]) for matmul, seed in curves if matmul == "fp8"]
    found: dict[str, Any] = {
        f"{name}_{kind}": [round(float(function(each[:-1])), 5) for each in distances]
        for name, distances in (("seeds", between), ("fp8", apart))
        for kind, function in (("largest", np.max), ("mean", np.mean))
    }
    found["held_out"] = {f"{matmul} {seed}": round(float(own[-1]), 5) for (matmul, seed), own in curves.items()}
    found["first_and_last"] = [round(float(curves["16bit", 0][at]), 3) for at in (0, -2)]
    found["float8_products"] = [own["kernels"]["fused"].get("products in float8") for own in reports.values()]
    found["holds"] = bool(np.max(apart) <= np.max(between))
    return found


if __name__ == "__main__":
    main()
