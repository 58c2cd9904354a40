"""Whether training with train.matmul fp8 learns what 16 bits learn: loss curves on a real model and real text.

    python benchmarks/float8.py [--recipe recipes/compare-ptq-qat.yaml] [--steps 200] [--seeds 3] [--folder runs/float8]

trains RECIPE's model, on an nf4 base and in 16 bits, on text that every machine with torch has (texts.py), whole files
held out: with 16-bit products from each seed, and in float8 from all but the last. A seed is the recipe's: it draws the
adapters and the order of the rows (--same-order: the adapters alone). For each base: how far float8's curves (means of
ten steps, and the loss on held-out rows every fifty) lie from those of 16 bits with its seed, and how far those of two
seeds lie from each other. One line a training as it ends, and one a base; float8 holds where neither its mean nor its
largest distance, of either curve and from any seed, is larger than the largest such between seeds.
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
ROWS, HELD_OUT, MEAN, EVERY = 8, 128, 10, 50
"""Rows of a step, held-out rows, steps of which a point of a curve is the mean, and from one evaluation to the next."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/compare-ptq-qat.yaml"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="two or more")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--same-order", action="store_true")
    parser.add_argument("--length", type=int, default=512, help="most tokens of a row")
    parser.add_argument("--emulated", action="store_true", help="on a CPU, by the references of the kernels: hours")
    parser.add_argument("--train", metavar="RECIPE", help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=[*BASES])
    parser.add_argument("--folder", type=Path, default=Path("runs/float8"))
    options = parser.parse_args()
    if options.train:
        emulated(options.train)
        return
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
    values["data"] |= {"max_length": options.length, "format": "text", "on_too_long": "truncate"}
    values["model"] = values.get("model", {}) | ({"device": "cpu"} if options.emulated else {})
    values["train"] = {
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "sequential" if options.same_order else "random",
        "eval_strategy": "steps",
        "eval_steps": EVERY,
        "save_strategy": "no",
        "report_to": [],
        "matmul": matmul,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(values), "utf-8")
    command = [sys.executable, "-m", "qft", "train", str(path), "--json", "--overwrite"]
    if options.emulated:
        command = [sys.executable, __file__, "--train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    points = {part: own.round(4).tolist() for part, own in curves(report).items()}
    print(json.dumps({"ran": name, "seconds": round(report["wall_seconds"]), **points}), flush=True)
    return report


def emulated(recipe: str) -> None:
    """Train as a GPU does: what its kernels compute, their references do, in the same numbers."""
    from qft.cli import main
    from qft.kernels import attach
    from qft.plan import kernels

    kernels._nowhere = kernels._no_float8 = lambda model: None
    attach._on_gpu = lambda x: True
    sys.argv = ["qft", "train", recipe, "--json", "--overwrite"]
    main()


def curves(report: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Means of MEAN steps each, and the losses on held-out rows, in nats a token."""
    losses = np.array([loss for _, loss, *_ in report["loss"]["history"]])
    held_out = [evaluation["loss"] for evaluation in (*report["eval"]["history"], report["eval"]["after"])]
    return {"train": losses.reshape(-1, MEAN).mean(1), "held_out": np.array(held_out)}


def verdict(reports: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """Distances of curves, mean and largest of each pair, in nats a token."""
    found: dict[str, Any] = {}
    told = {arm: curves(report) for arm, report in reports.items()}
    seeds = sorted(seed for matmul, seed in told if matmul == "16bit")
    pairs = {"seeds": list(combinations((("16bit", seed) for seed in seeds), 2))}
    pairs["fp8"] = [(arm, ("16bit", arm[1])) for arm in told if arm[0] == "fp8"]
    holds = True
    for part in ("train", "held_out"):
        for kind, function in (("mean", np.mean), ("largest", np.max)):
            apart = {
                who: [float(function(np.abs(told[a][part] - told[b][part]))) for a, b in of]
                for who, of in pairs.items()
            }
            found |= {f"{part}_{kind}_{who}": [round(each, 5) for each in own] for who, own in apart.items()}
            holds &= max(apart["fp8"]) <= max(apart["seeds"])
    found["held_out"] = {f"{arm} {seed}": own["held_out"].round(5).tolist() for (arm, seed), own in told.items()}
    found["float8_products"] = [own["kernels"]["fused"].get("products in float8") for own in reports.values()]
    return found | {"holds": bool(holds)}


if __name__ == "__main__":
    main()
