"""What rounding takes from a finetuned model, and how much of it quantization-aware training gives back.

    python benchmarks/qat.py [--target int4-g32] [--steps 60] [--folder runs/qat-benchmark]

trains recipes/qat.yaml twice on the same rows in the same order, without rounding and with it, and compares on held-out
rows: the first run as it is, the first rounded afterwards, the second as it was trained and is exported. The rows are
the quick start's, as many as are needed to see each once: three hundred are soon known by heart. `recovered` is the
share of the perplexity lost by rounding afterwards that the second has not lost, with its 95% interval over rows. A run
that FOLDER holds complete is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from runpy import run_path
from typing import Any

import yaml

from qft.data.batch import pad_token_id
from qft.data.encoded import read_rows
from qft.measure.likelihood import Likelihood, Passage, measure
from qft.measure.statistics import Interval, interval
from qft.model.target import Target, load_target, parse_target

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
BATCH, HELD_OUT = 10, 150
"""Rows in a step, and rows that are asked."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="int4-g32", help="quant.target")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=Path("runs/qat-benchmark"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = run_path(str(RECIPES / "quickstart" / "make_data.py"))
    rows["write"](options.folder / "train.jsonl", options.steps * BATCH, rows["training_order"], seed=1)
    rows["write"](options.folder / "held_out.jsonl", HELD_OUT, rows["held_out_order"], seed=2)
    trained = finetuned(options, "float", {"mode": "none"})
    qat = finetuned(options, "qat", {"mode": "qat", "target": options.target})
    targets = {"float": trained, "rounded afterwards": replace(qat, adapter=trained.adapter), "qat": qat}
    found = {name: likelihood(target) for name, target in targets.items()}
    for name, told in found.items():
        print(json.dumps({"model": name, "perplexity": shown(interval(told.perplexity, len(told.tokens), seed=0))}))
    plain, afterwards, ours = found.values()

    def recovered(rows: Any = None) -> Any:
        lost = afterwards.perplexity(rows) - plain.perplexity(rows)
        return (afterwards.perplexity(rows) - ours.perplexity(rows)) / lost

    print(json.dumps({"recovered": shown(interval(recovered, len(plain.tokens), seed=0))}))


def finetuned(options: argparse.Namespace, arm: str, quant: dict[str, Any]) -> Target:
    """The run of one arm, as `qft eval` knows it."""
    recipe = yaml.safe_load((RECIPES / "qat.yaml").read_text("utf-8"))
    folder = options.folder.resolve() / arm
    data = {part: str(folder.with_name(f"{name}.jsonl")) for part, name in (("train", "train"), ("eval", "held_out"))}
    made = recipe | {
        "extends": str(RECIPES / recipe["extends"]),
        "quant": {"preset": None} | quant,
        "data": data,
        "train": {"max_steps": options.steps, "per_device_train_batch_size": BATCH},
        "eval": {"samples": 1},
        "output_dir": str(folder),
    }
    folder.with_suffix(".yaml").write_text(json.dumps(made), "utf-8")
    if not (folder / "report.json").exists():
        command = [sys.executable, "-m", "qft", "train", str(folder.with_suffix(".yaml")), "--overwrite"]
        subprocess.run(command, check=True)
    return parse_target(str(folder), adapter=None, data=None)


def likelihood(target: Target) -> Likelihood:
    """Of the held-out rows that the run keeps."""
    assert target.rows is not None
    plan, rows = target.plan(), read_rows(target.rows).rows
    passages = [Passage(row["input_ids"], row["labels"]) for row in rows]
    return measure(load_target(target, plan), passages, batch_size=8, pad=pad_token_id(plan.tokenizer))


def shown(found: Interval) -> list[float]:
    """Value, low, high."""
    return [round(each, 4) for each in found]


if __name__ == "__main__":
    main()
