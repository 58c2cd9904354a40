"""What rounding takes from a finetuned model, and how much of it quantization-aware training gives back.

    python benchmarks/qat.py [--target int4-g32] [--steps 120] [--folder runs/qat-benchmark]

trains recipes/qat.yaml twice on the same rows in the same order, without rounding and with it, and compares on the
held-out rows: the first run as it is, the first rounded afterwards, the second as it was trained and is exported.
`recovered` is the share of the perplexity lost by rounding afterwards that the second has not lost, with its 95%
interval over rows. A run that FOLDER holds complete is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from qft.data.batch import pad_token_id
from qft.data.encoded import read_rows
from qft.measure.likelihood import Likelihood, Passage, measure
from qft.measure.statistics import Interval, interval
from qft.model.target import Target, load_target, parse_target

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="int4-g32", help="quant.target")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--folder", type=Path, default=Path("runs/qat-benchmark"))
    options = parser.parse_args()
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
    made = recipe | {
        "extends": str(RECIPES / recipe["extends"]),
        "quant": {"preset": None} | quant,
        "train": recipe["train"] | {"max_steps": options.steps},
        "eval": {"samples": 1},
        "output_dir": str(folder),
    }
    path = folder.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made), "utf-8")
    if not (folder / "report.json").exists():
        subprocess.run([sys.executable, "-m", "qft", "train", str(path), "--overwrite"], check=True)
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
