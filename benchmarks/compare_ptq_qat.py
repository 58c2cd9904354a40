"""Quantization-aware training or quantizing afterwards: the same model, data and 4 bits in every way, as one table.

    python benchmarks/compare_ptq_qat.py RECIPE [--rows orders|text] [--learning-rates 1e-3 2e-3]
        [--folder runs/compare] [--jobs 1] [--arms NAME...]

trains RECIPE, a LoRA training in 16 bits, as it is, with all weights, on an nf4 base, and within int4-g32's rounding;
quantizes what was not rounded (to the nearest, and by auto-round), and asks all of them the held-out rows: perplexity,
KL divergence from the same training unquantized, the recipe's score, each with its 95% interval. `recovered` is the
share of the perplexity lost by rounding to the nearest afterwards that is not lost. Artifacts are loaded as they are
deployed. With --rows, rows of RECIPE are replaced by orders as in the quick start, each seen once, or by text that
every machine with torch has (texts.py), whole files held out.

With several learning rates each training is made with each of them (all weights with a tenth), and a third of the
held-out rows chooses: of every way the one that is deployed with the lowest perplexity there is told, of the others.
What FOLDER holds complete is not made again. Several GPUs are used in turn, if --jobs says so.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from queue import Queue
from runpy import run_path
from threading import Lock
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
from qft.progress import View
from qft.recipe import load
from qft.run.folder import Run

QAT = {"quant": {"mode": "qat", "target": "int4-g32"}}
ROUNDED = {"bits": 4, "group_size": 32, "verify_samples": 8}
HELD_OUT = 150
"""Rows that --rows makes, of which figures are told; half as many more choose a learning rate."""
CONTEXT = multiprocessing.get_context("spawn")  # a process that is forked has no GPU once a library has asked for it
STARTING = Lock()


@dataclass
class Arm:
    """One way from the base to what is deployed."""

    name: str
    changes: dict[str, Any]
    """Of the recipe; of a calibration its section alone."""
    after: str | None = None
    """The way, or the arm, that is made first: the best result is trained on, or quantized."""
    form: str | None = None
    """As which it is exported."""
    words: str = ""
    """Of the table; empty: it is only on the way to others."""
    family: str = "lora"
    """The training in 16 bits with which it is compared."""
    way: str = ""
    """The name without its learning rate."""
    rate: float | None = None
    """The learning rate, of its own or of what it quantizes. None: of the best that it goes on from."""

    @property
    def calibrates(self) -> bool:
        return "calibrate" in self.changes

    def at(self, rates: list[float]) -> Iterator[Arm]:
        """With each learning rate. What searches takes long, so that it takes the best training alone."""
        if self.calibrates and self.changes["calibrate"]["engine"] != "rtn":
            yield replace(self, way=self.name)
            return
        for rate in rates:
            own = rate / 10 if self.family == "full" else rate
            after = f"{self.after}@{own:g}" if self.calibrates else self.after
            yield replace(self, name=f"{self.name}@{own:g}", way=self.name, rate=own, after=after)


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

    @cached_property
    def ways(self) -> dict[str, list[Arm]]:
        """The arms of each, by its name."""
        found: dict[str, list[Arm]] = {}
        for arm in self.arms.values():
            found.setdefault(arm.way, []).append(arm)
        return found

    def best(self, way: str) -> Arm:
        """Of those that were made, by the rows that choose."""
        made = [arm for arm in self.ways[way] if self.read(arm).exists()]
        return min(made, key=lambda arm: float(likelihood(self, arm, chosen=False).perplexity()))

    def make(self) -> None:
        """Some at once, each behind those that it needs; first those that others need."""
        for job in range(self.options.jobs):
            self.devices.put(str(job % max(torch.cuda.device_count(), 1)))
        needed = {arm.after for arm in self.arms.values()}
        order = sorted(self.arms.values(), key=lambda arm: (bool(arm.after), arm.way not in needed))
        made: dict[str, Future[None]] = {}
        with ThreadPoolExecutor(len(order) + len(self.ways)) as pool:
            for arm in order:
                made[arm.name] = pool.submit(self._made, arm, self._of(made, arm.after or ""))
            asked = [
                pool.submit(self._asked, way, self._of(made, way) + self._of(made, arms[0].family))
                for way, arms in self.ways.items()
                if arms[0].words
            ]
        for each in [*made.values(), *asked]:
            each.result()

    def _of(self, made: dict[str, Future[None]], name: str) -> list[Future[None]]:
        """Of an arm, or of all of a way."""
        return [made[arm.name] for arm in self.arms.values() if name in (arm.name, arm.way)]

    def artifact(self, arm: Arm) -> Path:
        """What is deployed."""
        run = self.folder / arm.name
        return run / "export" / arm.form if arm.form and arm.form != "merged" else run

    def before(self, arm: Arm) -> Arm:
        """What it goes on from."""
        assert arm.after
        return self.arms.get(arm.after) or self.best(arm.after)

    def _made(self, arm: Arm, needed: list[Future[None]]) -> None:
        for each in needed:
            each.result()
        if not self.read(arm).exists():
            self._run(make_one, arm)

    def _asked(self, way: str, needed: list[Future[None]]) -> None:
        for each in needed:
            each.result()
        if not self.told(best := self.best(way)).exists():
            self._run(ask_one, best)

    def _run(self, function: Callable[..., None], arm: Arm) -> None:
        """In a process of its own."""
        device = self.devices.get()
        try:
            process = CONTEXT.Process(target=function, args=(self.options, arm.name))
            with STARTING:
                os.environ["CUDA_VISIBLE_DEVICES"] = device  # before it imports anything
                process.start()
            process.join()
            if process.exitcode:
                raise RuntimeError(f"{arm.name}: {function.__name__} has failed")
        finally:
            self.devices.put(device)

    def read(self, arm: Arm) -> Path:
        """How likely its artifact found each held-out row."""
        return self.folder / f"{arm.name}.read.json"

    def told(self, arm: Arm) -> Path:
        """What else its artifact made of them, if it is the best of its way."""
        return self.folder / f"{arm.name}.told.json"

    def recipe(self, arm: Arm) -> dict[str, Any]:
        made = copy.deepcopy(self.values) | copy.deepcopy(arm.changes) | {"output_dir": str(self.folder / arm.name)}
        if arm.changes.get("quant", {}).get("distill"):
            made["train"]["max_steps"] = self.options.distill_steps or 2 * made["train"]["max_steps"]
        made["train"]["learning_rate"] = arm.rate
        made["eval"] = {}  # the artifact is asked
        if arm.after:
            before = self.folder / self.before(arm).name
            made["model"]["path"] = str(before if arm.calibrates else before / "export" / "merged")
        if arm.calibrates:
            made = {name: section for name, section in made.items() if name not in ("train", "adapter", "quant")}
        return made

    def seconds(self, arm: Arm) -> float:
        """Of all that led to it, exports aside."""
        own: float = self._report(arm)["wall_seconds"]
        return own + (self.seconds(self.before(arm)) if arm.after else 0.0)

    def peak(self, arm: Arm) -> int:
        """Bytes of the device, the largest of all that led to it."""
        report = self._report(arm)
        memory = report.get("memory", report)
        own = int(memory.get("peak_gpu_bytes") or memory.get("peak_bytes") or memory["peak_host_bytes"])
        return max(own, self.peak(self.before(arm)) if arm.after else 0)

    def _report(self, arm: Arm) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / arm.name / "report.json").read_text("utf-8"))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", default=Path("recipes/compare-ptq-qat.yaml"))
    parser.add_argument("--rows", choices=["orders", "text"], help="instead of the recipe's")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--learning-rates", type=float, nargs="+", help="instead of the recipe's")
    parser.add_argument("--distill-steps", type=int, help="of what is distilled, instead of twice the recipe's")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"))
    parser.add_argument("--jobs", type=int, default=1, help="arms made at once: times are then no measure")
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], help="only these, and what they need")
    parser.add_argument("--table", action="store_true", help="make nothing, and print what FOLDER holds")
    options = parser.parse_args()
    prepare_libraries()
    comparison = comparison_of(options)
    if not options.table:
        write_rows(comparison)
        comparison.make()
    print_table(comparison)


def comparison_of(options: argparse.Namespace) -> Comparison:
    comparison = Comparison(options, copy.deepcopy(load(options.recipe).tree.values))
    train = comparison.values["train"]
    train |= {"save_strategy": "no"}
    train |= {"max_steps": options.steps} if options.steps else {}
    asked = [arm for arm in ARMS if arm.name in (options.arms or arm.name)]
    wanted = {name for arm in asked for name in (arm.name, arm.after, arm.family, f"{arm.family}-rtn")}
    rates = options.learning_rates or [float(train["learning_rate"])]
    comparison.arms = {arm.name: arm for each in ARMS if each.name in wanted for arm in each.at(rates)}
    if options.rows:
        files = {part: str(path) for part, path in _files(comparison).items()}
        comparison.values["data"] = files | {"max_length": 512}
    if options.rows == "text":
        comparison.values["data"] |= {"format": "text", "on_too_long": "truncate"}
        comparison.values["eval"] = {}
    return comparison


def _files(comparison: Comparison) -> dict[str, Path]:
    return {part: comparison.folder / f"{comparison.options.rows}-{part}.jsonl" for part in ("train", "eval")}


def write_rows(comparison: Comparison) -> None:
    """Of another kind than the recipe's, of which each is seen once, if there are so many."""
    train, rows = comparison.values["train"], comparison.options.rows
    held_out = HELD_OUT * 3 // 2 if comparison.options.learning_rates else HELD_OUT
    counts = {"train": train["max_steps"] * train["per_device_train_batch_size"], "eval": held_out}
    files = _files(comparison) if rows else {}
    if rows == "orders":
        made = run_path(str(Path(__file__).parent.parent / "recipes" / "quickstart" / "make_data.py"))
        made["write"](files["train"], counts["train"], made["training_order"], seed=1)
        made["write"](files["eval"], counts["eval"], made["held_out_order"], seed=2)
    elif rows == "text":
        texts = library_texts()
        for part, path in files.items():
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[part][: counts[part]]), "utf-8")


def make_one(options: argparse.Namespace, name: str) -> None:
    """Train or quantize, export, and keep how likely the artifact finds each held-out row: nats and tokens."""
    comparison, arm = _begun(options, name)
    from qft.commands.calibrate import calibrate
    from qft.commands.train import train
    from qft.export import ExportOptions, export

    run = comparison.folder / arm.name
    if not (run / "report.json").exists():
        path = comparison.folder / f"{arm.name}.yaml"
        path.write_text(json.dumps(comparison.recipe(arm)), "utf-8")
        (calibrate if arm.calibrates else train)(load(path), View(), overwrite=True)
    if arm.form and not (run / "export" / arm.form).exists():
        export(run, ExportOptions(to=(arm.form,)), View())
    own, tokenizer = _loaded(comparison, arm)
    passages = [Passage.of(row) for row in _rows(comparison, arm)]
    found = measure(own, passages, batch_size=8, pad=pad_token_id(tokenizer))
    comparison.read(arm).write_text(json.dumps({"nll": found.nll.tolist(), "tokens": found.tokens.tolist()}), "utf-8")


def ask_one(options: argparse.Namespace, name: str) -> None:
    """Keep what the artifact makes of the rows that are told: nats from the first of its family, and scores."""
    comparison, arm = _begun(options, name)
    held_out = _rows(comparison, arm)
    rows = [held_out[index] for index in np.flatnonzero(is_told(comparison, len(held_out))).tolist()]
    own, tokenizer = _loaded(comparison, arm)
    told: dict[str, Any] = {"kl": None, "scores": {}}
    if arm.way != arm.family:
        plain, _ = _loaded(comparison, comparison.best(arm.family))
        found = compare([row["labels"] for row in rows], _logits(plain, rows), _logits(own, rows)).after
        told["kl"] = (found.mean_kl(np.arange(len(rows))[:, None]) * found.tokens).tolist()
    if metrics := comparison.values.get("eval", {}).get("metrics", []):
        settings = load(options.recipe).recipe.eval
        answers = answer_rows(own, tokenizer, rows, settings)
        told["scores"] = {name: list(score(name, answers, pattern=settings.regex)) for name in metrics}
    comparison.told(arm).write_text(json.dumps(told), "utf-8")


def _begun(options: argparse.Namespace, name: str) -> tuple[Comparison, Arm]:
    prepare_libraries()
    comparison = comparison_of(options)
    return comparison, comparison.arms[name]


def _rows(comparison: Comparison, arm: Arm) -> Any:
    """The held-out rows, as its training keeps them."""
    if arm.calibrates:
        return _rows(comparison, comparison.before(arm))
    return read_rows(Run(comparison.folder / arm.name).rows).rows


def is_told(comparison: Comparison, count: int) -> Any:
    """Of which rows figures are told, bool [count]; the others choose a learning rate."""
    several = len(comparison.options.learning_rates or []) > 1
    return np.arange(count) < count - several * (count // 3)


def _loaded(comparison: Comparison, arm: Arm) -> tuple[Any, Any]:
    target = parse_target(str(comparison.artifact(arm)), adapter=None, data=None)
    plan = target.plan()
    return load_target(target, plan), plan.tokenizer


def _logits(model: Any, rows: Any) -> Iterator[torch.Tensor]:
    for row in rows:
        with torch.inference_mode():
            yield model(input_ids=torch.tensor([row["input_ids"]], device=model.device)).logits[0]


def print_table(comparison: Comparison) -> None:
    """As Markdown, intervals in brackets; each line also as JSON into FOLDER/table.jsonl, with the learning rates that
    were not chosen."""
    metrics = comparison.values.get("eval", {}).get("metrics", [])
    columns = ["", "configuration", "learning rate", "perplexity", "recovered", "KL", *metrics]
    columns += ["MiB", "seconds", "peak, GiB"]
    print(f"| {' | '.join(columns)} |\n| --- | --- |{' ---: |' * (len(columns) - 2)}")
    with (comparison.folder / "table.jsonl").open("w", encoding="utf-8") as stream:
        for arm in comparison.arms.values():
            needed = [[arm], *(comparison.ways[way] for way in (arm.family, f"{arm.family}-rtn"))]
            if not arm.words or not all(any(comparison.read(each).exists() for each in arms) for arms in needed):
                continue
            line = {"arm": arm.way, "rate": arm.rate, "best": comparison.best(arm.way) is arm} | figures(
                comparison, arm
            )
            stream.write(json.dumps(line) + "\n")
            if line["best"]:
                cells = map(_cell, [line["perplexity"], line["recovered"], line["kl"], *(line.get(m) for m in metrics)])
                costs = (f"{line['bytes'] / 2**20:.0f}", f"{line['seconds']:.0f}", f"{line['peak'] / 2**30:.1f}")
                row = [arm.words, configuration(comparison, arm), f"{arm.rate:g}" if arm.rate else "", *cells, *costs]
                print(f"| {' | '.join(row)} |")


def configuration(comparison: Comparison, arm: Arm) -> str:
    """In what its recipe differs, and that of what it starts from."""
    own = [f"`{section}: {json.dumps(values)}`" for section, values in arm.changes.items() if values]
    text = ", ".join(own).replace('"', "") or "`quant: {mode: none}`"
    return f"{configuration(comparison, comparison.before(arm))}; then {text}" if arm.after else text


def figures(comparison: Comparison, arm: Arm) -> dict[str, Any]:
    """Of one arm, those with intervals as [value, low, high]; those of the best alone are None of others."""
    path, family = comparison.told(arm), arm.family
    told = json.loads(path.read_text("utf-8")) if path.exists() else {"kl": None, "scores": {}}
    own = likelihood(comparison, arm)
    plain, rounded = (likelihood(comparison, comparison.best(way)) for way in (family, f"{family}-rtn"))

    def recovered(drawn: Any = None) -> Any:
        lost = rounded.perplexity(drawn) - plain.perplexity(drawn)
        return (rounded.perplexity(drawn) - own.perplexity(drawn)) / lost

    def mean_kl(drawn: Any) -> Any:
        return np.array(told["kl"])[drawn].sum(-1) / own.tokens[drawn].sum(-1)

    def bounds(statistic: Any) -> list[float]:
        return [round(each, 5) for each in interval(statistic, len(own.tokens), seed=0)]

    return {
        "perplexity": bounds(own.perplexity),
        "recovered": None if arm.way in (family, f"{family}-rtn") else bounds(recovered),
        "kl": bounds(mean_kl) if told["kl"] else None,
        "bytes": _weight_files(comparison, arm),
        "seconds": comparison.seconds(arm),
        "peak": comparison.peak(arm),
        **told["scores"],
    }


def likelihood(comparison: Comparison, arm: Arm, *, chosen: bool = True) -> Likelihood:
    """Of the rows that are told, or of those that choose."""
    read = json.loads(comparison.read(arm).read_text("utf-8"))
    told = is_told(comparison, len(read["tokens"]))
    if not chosen:
        told = told if told.all() else ~told
    return Likelihood(np.array(read["nll"])[told], np.array(read["tokens"])[told])


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
