"""Quantization-aware training or quantizing afterwards: the same model, data and 4 bits in every way, as one table.

    python benchmarks/compare_ptq_qat.py RECIPE [--rows orders|text] [--folder runs/compare] [--jobs 1] [--arms NAME...]

trains RECIPE, a LoRA training in 16 bits, as it is, with all weights, on an nf4 base, and within int4-g32's rounding;
quantizes what was not rounded (to the nearest, and by auto-round), and asks all of them the held-out rows: perplexity,
KL divergence from the same training unquantized, the recipe's score, each with its 95% interval. `recovered` is the
share of the perplexity lost by rounding to the nearest afterwards that is not lost. Artifacts are loaded as they are
deployed. With --rows, rows of RECIPE are replaced by orders as in the quick start, each seen once, or by text that
every machine with torch has (texts.py), whole files held out. What FOLDER holds complete is not made again. Several
GPUs are used in turn, if --jobs says so.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from queue import Queue
from runpy import run_path
from typing import Any

import numpy as np
import torch
from texts import library_texts

from qft.data.batch import pad_token_id
from qft.data.encoded import read_rows
from qft.machine.environment import prepare_libraries
from qft.measure.likelihood import Likelihood, Passage, compare, measure
from qft.measure.scores import answer_rows, score
from qft.measure.statistics import interval
from qft.model.target import load_target, parse_target
from qft.recipe import load
from qft.run.folder import Run

QAT = {"quant": {"mode": "qat", "target": "int4-g32"}}
ROUNDED = {"bits": 4, "group_size": 32, "verify_samples": 8}
HELD_OUT = 150
"""Rows that --rows makes."""


@dataclass
class Arm:
    """One way from the base to what is deployed."""

    name: str
    changes: dict[str, Any]
    """Of the recipe; of a calibration its section alone."""
    after: str | None = None
    """The arm that is made first: its result is trained on, or quantized."""
    form: str | None = None
    """As which it is exported."""
    words: str = ""
    """Of the table; empty: it is only on the way to others."""
    family: str = "lora"
    """The training in 16 bits with which it is compared."""


def _quantized(of: str, words: str, family: str = "lora") -> Iterator[Arm]:
    for engine, how in (("rtn", "rounded to nearest"), ("autoround", "by auto-round")):
        calibrate = ROUNDED | {"engine": engine} | ({"samples": 64, "max_length": 256} if engine != "rtn" else {})
        yield Arm(f"{of}-{engine}", {"calibrate": calibrate}, of, words=f"{words}, then {how}", family=family)


FULL: dict[str, Any] = {"adapter": {"kind": "none"}}
LEARNT = {"quant": QAT["quant"] | {"learn_scales": True}}
DISTILLED = {"quant": LEARNT["quant"] | {"distill": True}}
MIXED = {"quant": LEARNT["quant"] | {"distill": 0.5}}
ARMS = [
    Arm("lora", {"quant": {}}, form="merged", words="LoRA in 16 bits (not quantized)"),
    *_quantized("lora", "LoRA in 16 bits"),
    Arm("qlora", {"quant": {"preset": "finetune"}}),
    *_quantized("qlora", "QLoRA on nf4, merged"),
    Arm("qat-lora", QAT, form="compressed-tensors", words="QAT, LoRA"),
    Arm("qat-learnt", LEARNT, form="compressed-tensors", words="QAT, LoRA, scales learnt"),
    Arm("distilled", DISTILLED, "lora", "compressed-tensors", "LoRA in 16 bits, then distilled"),
    Arm("mixed", MIXED, "lora", "compressed-tensors", "LoRA in 16 bits, then distilled, half of the loss the data's"),
    Arm("full", {"quant": {}} | FULL, words="all weights in 16 bits (not quantized)", family="full"),
    *_quantized("full", "all weights in 16 bits", "full"),
    Arm("qat-full", QAT | FULL, form="compressed-tensors", words="QAT, all weights", family="full"),
]


@dataclass
class Comparison:
    """All arms of one recipe, in a folder."""

    options: argparse.Namespace
    values: dict[str, Any]
    """Of the recipe, paths absolute."""
    arms: dict[str, Arm] = field(default_factory=dict)
    devices: Queue[str] = field(default_factory=Queue)
    """For each of the arms that are made at once, the GPU that it may see."""

    @cached_property
    def folder(self) -> Path:
        made: Path = self.options.folder.resolve() / (self.options.rows or self.options.recipe.stem)
        made.mkdir(parents=True, exist_ok=True)
        return made

    def make(self) -> None:
        """Some at once, each behind those that it needs, which come before it."""
        for job in range(self.options.jobs):
            self.devices.put(str(job % max(torch.cuda.device_count(), 1)))
        made: dict[str, Future[None]] = {}
        with ThreadPoolExecutor(len(self.arms)) as pool:
            for arm in self.arms.values():
                needed = {name: made[name] for name in (arm.after, arm.family) if name in made}
                made[arm.name] = pool.submit(self._made, arm, needed)
        for each in made.values():
            each.result()

    def artifact(self, arm: Arm) -> Path:
        """What is deployed."""
        run = self.folder / arm.name
        return run / "export" / arm.form if arm.form and arm.form != "merged" else run

    def _made(self, arm: Arm, needed: dict[str, Future[None]]) -> None:
        """And asked the held-out rows, once that with which it is compared is there."""
        if arm.after:
            needed[arm.after].result()
        run = self.folder / arm.name
        if not (run / "report.json").exists():
            path = self.folder / f"{arm.name}.yaml"
            path.write_text(json.dumps(self._recipe(arm)), "utf-8")
            self._run(
                "-m", "qft", "calibrate" if "calibrate" in arm.changes else "train", path, "--overwrite", "--quiet"
            )
        if arm.form and not (run / "export" / arm.form).exists():
            self._run("-m", "qft", "export", run, "--to", arm.form, "--quiet")
        if arm.words and not self.told(arm).exists():
            if arm.name != arm.family:
                needed[arm.family].result()
            self._run(*sys.argv, "--ask", arm.name)

    def _run(self, *arguments: Any) -> None:
        device = self.devices.get()
        try:
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": device}
            subprocess.run([sys.executable, *map(str, arguments)], check=True, env=environment)
        finally:
            self.devices.put(device)

    def told(self, arm: Arm) -> Path:
        """What its artifact made of the held-out rows."""
        return self.folder / f"{arm.name}.told.json"

    def _recipe(self, arm: Arm) -> dict[str, Any]:
        made = copy.deepcopy(self.values) | copy.deepcopy(arm.changes) | {"output_dir": str(self.folder / arm.name)}
        if arm.changes.get("quant", {}).get("distill"):
            made["train"]["max_steps"] = self.options.distill_steps or 2 * made["train"]["max_steps"]
        if arm.changes.get("adapter"):
            made["train"]["learning_rate"] = self.options.full_learning_rate
        if arm.after:
            before = self.folder / arm.after
            made["model"]["path"] = str(before if "calibrate" in arm.changes else before / "export" / "merged")
        if "calibrate" in arm.changes:
            made = {name: section for name, section in made.items() if name not in ("train", "adapter", "quant")}
        return made

    def seconds(self, arm: Arm) -> float:
        """Of all that led to it, exports aside."""
        own: float = self._report(arm)["wall_seconds"]
        return own + (self.seconds(self.arms[arm.after]) if arm.after else 0.0)

    def peak(self, arm: Arm) -> int:
        """Bytes of the device, the largest of all that led to it."""
        report = self._report(arm)
        memory = report.get("memory", report)
        own = int(memory.get("peak_gpu_bytes") or memory.get("peak_bytes") or memory["peak_host_bytes"])
        return max(own, self.peak(self.arms[arm.after]) if arm.after else 0)

    def _report(self, arm: Arm) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / arm.name / "report.json").read_text("utf-8"))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", default=Path("recipes/compare-ptq-qat.yaml"))
    parser.add_argument("--rows", choices=["orders", "text"], help="instead of the recipe's")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--learning-rate", type=float, help="instead of the recipe's")
    parser.add_argument("--full-learning-rate", type=float, default=1e-4, help="where all weights are trained")
    parser.add_argument("--distill-steps", type=int, help="of what is distilled, instead of twice the recipe's")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"))
    parser.add_argument("--jobs", type=int, default=1, help="arms made at once: times are then no measure")
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], help="only these, and what they need")
    parser.add_argument("--table", action="store_true", help="make nothing, and print what FOLDER holds")
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    options = parser.parse_args()
    prepare_libraries()
    comparison = Comparison(options, copy.deepcopy(load(options.recipe).tree.values))
    asked = [arm for arm in ARMS if arm.name in (options.arms or arm.name)]
    wanted = {name for arm in asked for name in (arm.name, arm.after, arm.family, f"{arm.family}-rtn")}
    comparison.arms = {arm.name: arm for arm in ARMS if arm.name in wanted}
    train = comparison.values["train"]
    train |= {"save_strategy": "no"}
    train |= {"max_steps": options.steps} if options.steps else {}
    train |= {"learning_rate": options.learning_rate} if options.learning_rate else {}
    if options.rows:
        replace_rows(comparison)
    if options.ask:
        ask(comparison, comparison.arms[options.ask])
        return
    if not options.table:
        comparison.make()
    print_table(comparison)


def replace_rows(comparison: Comparison) -> None:
    """By rows of another kind, of which each is seen once, if there are so many."""
    folder, kind, values = comparison.folder, comparison.options.rows, comparison.values
    files = {part: folder / f"{kind}-{part}.jsonl" for part in ("train", "eval")}
    count = values["train"]["max_steps"] * values["train"]["per_device_train_batch_size"]
    data = values["data"] = {part: str(path) for part, path in files.items()} | {"max_length": 512}
    if kind == "text":
        data |= {"format": "text", "on_too_long": "truncate"}
        values["eval"] = {}
    if comparison.options.ask or comparison.options.table:
        return
    if kind == "orders":
        made = run_path(str(Path(__file__).parent.parent / "recipes" / "quickstart" / "make_data.py"))
        made["write"](files["train"], count, made["training_order"], seed=1)
        made["write"](files["eval"], HELD_OUT, made["held_out_order"], seed=2)
        return
    texts = library_texts()
    for part, path in files.items():
        most = count if part == "train" else HELD_OUT
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[part][:most]), "utf-8")


def ask(comparison: Comparison, arm: Arm) -> None:
    """Keep what the arm's artifact makes of each held-out row: nats, tokens, and nats from the first of its family."""
    rows = read_rows(Run(comparison.folder / arm.family).rows).rows
    own, tokenizer = _loaded(comparison, arm)
    if arm.name == arm.family:
        passages = [Passage(row["input_ids"], row["labels"]) for row in rows]
        found, kl = measure(own, passages, batch_size=8, pad=pad_token_id(tokenizer)), None
    else:
        plain, _ = _loaded(comparison, comparison.arms[arm.family])
        found = compare([row["labels"] for row in rows], _logits(plain, rows), _logits(own, rows)).after
        kl = (found.mean_kl(np.arange(len(rows))[:, None]) * found.tokens).tolist()
    told = {"nll": found.nll.tolist(), "tokens": found.tokens.tolist(), "kl": kl, "scores": {}}
    if metrics := comparison.values.get("eval", {}).get("metrics", []):
        settings = load(comparison.options.recipe).recipe.eval
        answers = answer_rows(own, tokenizer, rows, settings)
        told["scores"] = {name: list(score(name, answers, pattern=settings.regex)) for name in metrics}
    comparison.told(arm).write_text(json.dumps(told), "utf-8")


def _loaded(comparison: Comparison, arm: Arm) -> tuple[Any, Any]:
    target = parse_target(str(comparison.artifact(arm)), adapter=None, data=None)
    plan = target.plan()
    return load_target(target, plan), plan.tokenizer


def _logits(model: Any, rows: Any) -> Iterator[torch.Tensor]:
    for row in rows:
        with torch.inference_mode():
            yield model(input_ids=torch.tensor([row["input_ids"]], device=model.device)).logits[0]


def print_table(comparison: Comparison) -> None:
    """As Markdown, intervals in brackets; each line also as JSON into FOLDER/table.jsonl."""
    metrics = comparison.values.get("eval", {}).get("metrics", [])
    columns = ["", "configuration", "perplexity", "recovered", "KL", *metrics, "MiB", "seconds", "peak, GiB"]
    print(f"| {' | '.join(columns)} |\n| --- | --- |{' ---: |' * (len(columns) - 2)}")
    with (comparison.folder / "table.jsonl").open("w", encoding="utf-8") as stream:
        for arm in comparison.arms.values():
            if not arm.words or (comparison.options.table and not comparison.told(arm).exists()):
                continue
            line = figures(comparison, arm)
            stream.write(json.dumps({"arm": arm.name} | line) + "\n")
            cells = [line["perplexity"], line["recovered"], line["kl"], *(line[name] for name in metrics)]
            costs = (f"{line['bytes'] / 2**20:.0f}", f"{line['seconds']:.0f}", f"{line['peak'] / 2**30:.1f}")
            print(f"| {arm.words} | {configuration(comparison, arm)} | {' | '.join([*map(_cell, cells), *costs])} |")


def configuration(comparison: Comparison, arm: Arm) -> str:
    """In what its recipe differs, and that of what it starts from."""
    own = [f"`{section}: {json.dumps(values)}`" for section, values in arm.changes.items() if values]
    text = ", ".join(own).replace('"', "") or "`quant: {mode: none}`"
    return f"{configuration(comparison, comparison.arms[arm.after])}; then {text}" if arm.after else text


def figures(comparison: Comparison, arm: Arm) -> dict[str, Any]:
    """Of one arm, those with intervals as [value, low, high]."""
    told = json.loads(comparison.told(arm).read_text("utf-8"))
    own, plain, nearest = _likelihood(comparison, arm.name), _likelihood(comparison, arm.family), f"{arm.family}-rtn"
    rounded = _likelihood(comparison, nearest)

    def recovered(drawn: Any = None) -> Any:
        lost = rounded.perplexity(drawn) - plain.perplexity(drawn)
        return (rounded.perplexity(drawn) - own.perplexity(drawn)) / lost

    def mean_kl(drawn: Any) -> Any:
        return np.array(told["kl"])[drawn].sum(-1) / own.tokens[drawn].sum(-1)

    def bounds(statistic: Any) -> list[float]:
        return [round(each, 5) for each in interval(statistic, len(own.tokens), seed=0)]

    return {
        "perplexity": bounds(own.perplexity),
        "recovered": None if arm.name in (arm.family, nearest) else bounds(recovered),
        "kl": bounds(mean_kl) if told["kl"] else None,
        "bytes": _weight_files(comparison, arm),
        "seconds": comparison.seconds(arm),
        "peak": comparison.peak(arm),
        **told["scores"],
    }


def _likelihood(comparison: Comparison, name: str) -> Likelihood:
    told = json.loads(comparison.told(comparison.arms[name]).read_text("utf-8"))
    return Likelihood(np.array(told["nll"]), np.array(told["tokens"]))


def _weight_files(comparison: Comparison, arm: Arm) -> int:
    """Bytes of the model that is deployed; of LoRA's the merged one."""
    artifact = comparison.artifact(arm)
    merged = [artifact / "export" / "merged"] if arm.form == "merged" else []
    folder = next(each for each in (*merged, artifact / "model", artifact) if list(each.glob("*.safetensors")))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _cell(figure: list[float] | None) -> str:
    if figure is None:
        return ""
    digits = 3 if max(map(abs, figure)) >= 5 else 4
    value, low, high = (f"{each:.{digits}f}" for each in np.array(figure))
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    main()
