"""The same training by qft and by what one would take instead, side by side in one run.

    python benchmarks/speed.py                                     a tiny Llama, on whatever device there is
    python benchmarks/speed.py --size quickstart                   the step of recipes/quickstart.yaml, on a CPU
    python benchmarks/speed.py --size 8b --settings kept checkpointed 24
    python benchmarks/speed.py --size neox                         and phi, qwen, gemma, mixture, 1.5b (shapes.py)

Settings: kept (nothing is computed again), checkpointed, and GiB within which qft decides what to compute again: others
cannot, and are compared by what they do checkpointed. nf4 with double quantization and LoRA r=16 on all linear layers.
Arms: plain (transformers + peft + bitsandbytes), always; qft; liger and unsloth where they are installed (--unsloth: in
a folder of its own, for that arm alone); float8 (qft with train.matmul fp8) if --arms names it. Each arm of each run is
a process of its own, and the arms take turns. All are given the same tokens in the same order and the same nf4 weights.
Tokens/s are of the median step, behind those that warm up (--warm: the first ten of a small model's may take longer);
GiB are of max_memory_allocated behind the second step; the loss is the mean over all steps.
One line a run as it ends, and then one an arm: medians over the repeats with (least to most), and ratios to each other
arm that are taken within each repeat.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import modes
from shapes import SHAPES, make_model, place

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SHAPES, "quickstart"], default="tiny")
    parser.add_argument("--settings", nargs="+", default=["kept"], metavar="SETTING")
    parser.add_argument("--unsloth", metavar="FOLDER")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds behind which no run begins")
    parser.add_argument("--folder", type=Path, help="keep what is made here")
    parser.add_argument("--steps", type=int, default=10, help="behind those that warm up")
    parser.add_argument("--warm", type=int, default=3, help="steps that are not counted")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--optim", default="adamw_8bit", help="of the other arms; qft decides for itself")
    parser.add_argument("--arms", nargs="+", choices=ARMS)
    parser.add_argument("--peer", nargs=3, metavar=("ARM", "SETTING", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--make", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.warm < 1:
        parser.error("--warm: a step is timed from the end of the one before it")
    options.arms = options.arms or [arm for arm in ARMS if is_installed(arm) or (arm == "unsloth" and options.unsloth)]
    if options.make:
        make(Path(options.make), options)
    elif options.peer:
        arm, setting, folder = options.peer
        print(json.dumps(peer(arm, setting, Path(folder), options)))
    else:
        compare(options)


def is_installed(arm: str) -> bool:
    """Whether it runs without being asked for."""
    if arm == "float8":
        return False
    module = {"liger": "liger_kernel", "unsloth": "unsloth"}.get(arm, "peft")
    return importlib.util.find_spec(module) is not None


Runs = dict[tuple[str, str], list[dict[str, Any]]]
"""By setting and arm."""


def compare(options: argparse.Namespace) -> None:
    begun, found = time.monotonic(), Runs()
    with tempfile.TemporaryDirectory(dir=place()) as made:
        folder = (options.folder or Path(made)) / options.size  # two models in one folder would be no model
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, *sys.argv, "--make", str(folder)], check=True)
        asked = [(setting, arm) for setting in options.settings for arm in options.arms if has(arm, setting)]
        for setting, arm in asked * options.repeats:
            if time.monotonic() - begun < options.limit:
                result = run(arm, setting, folder, options)
                found.setdefault((setting, arm), []).append(result)
                print(json.dumps({"ran": [setting, arm], "at": round(time.monotonic() - begun), **result}), flush=True)
    for setting, arm in found:
        print(json.dumps({"setting": setting, "arm": arm, **summary(setting, arm, found)}), flush=True)


def has(arm: str, setting: str) -> bool:
    return arm in BY_QFT or setting in ("kept", "checkpointed")


def summary(setting: str, arm: str, found: Runs) -> dict[str, Any]:
    results, peers = found[setting, arm], setting if has("plain", setting) else "checkpointed"
    if failed := [result for result in results if "failed" in result]:
        return failed[0]
    others = {other: found.get((peers, other), []) for other in ARMS if other != arm}
    ratios = {other: ratio for other, runs in others.items() if (ratio := ratio_to(runs, results))}
    return {
        "tokens_per_second": spread([result["tokens_per_second"] for result in results], 0),
        "ratio_to": ratios,
        "step_ms": spread([result["step_seconds"] * 1e3 for result in results], 1),
        "peak_gib": round(max(result["peak_gib"] for result in results), 2),
        "loss": round(results[0]["loss"], 4),
        "tokens": results[0]["tokens"],
        **results[0].get("told", {}),
    }


def ratio_to(runs: list[dict[str, Any]], results: list[dict[str, Any]]) -> str | None:
    """Of tokens/s, repeat by repeat."""
    pairs = [(one, other) for one, other in zip(results, runs, strict=False) if "failed" not in other]
    rates = [one["tokens_per_second"] / other["tokens_per_second"] for one, other in pairs]
    return spread(rates, 2) if rates else None


def spread(values: list[float], digits: int) -> str:
    """As 12.1 (11.9 to 12.4)."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


# What all arms are given: FOLDER/model in nf4, FOLDER/rows.jsonl, and FOLDER/ids.json, the same rows as tokens


def make(folder: Path, options: argparse.Namespace) -> None:
    if options.size == "quickstart":
        make_quickstart(folder, options)
        return
    _, rows, length, _ = SHAPES[options.size]
    make_model(folder / "model", options.size)
    modes.make_rows(folder / "rows.jsonl", rows * (options.steps + options.warm), length)
    ids = modes.token_ids(folder)
    (folder / "ids.json").write_text(json.dumps({"rows": rows, "input_ids": ids, "labels": ids}))


def make_quickstart(folder: Path, options: argparse.Namespace) -> None:
    """The recipe's model in bfloat16, which the other arms quantize while they load it, and its rows."""
    import torch

    from qft.checkpoint.weights import dequantized
    from qft.plan import make_plan
    from qft.recipe import load

    plan = make_plan(load(ROOT / "recipes" / "quickstart.yaml"))
    model = dequantized(plan.model.checkpoint, torch.bfloat16)
    model.save_pretrained(folder / "model")
    plan.model.tokenizer.save_pretrained(folder / "model")
    train = plan.recipe.train
    count = train.micro_batch * (options.steps + options.warm)
    rows = {name: plan.data.train[name][:count] for name in ("input_ids", "labels")}
    (folder / "ids.json").write_text(json.dumps({"rows": train.micro_batch, **rows}))


# The arms


def run(arm: str, setting: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    environment = dict(os.environ)
    if arm in BY_QFT:
        made = recipe(arm, setting, folder, options)
        command = [sys.executable, "-m", "qft", "train", str(made), "--json", "--overwrite"]
    else:
        command = [sys.executable, *sys.argv, "--peer", arm, setting, str(folder)]
    if arm == "unsloth" and options.unsloth:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (options.unsloth, environment.get("PYTHONPATH"))))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if "memory" in line] or done.stderr.splitlines()
        return {"failed": done.returncode, "error": said[-1:][0][:200] if said else ""}
    return of_report(json.loads(done.stdout), options) if arm in BY_QFT else json.loads(done.stdout.splitlines()[-1])


def recipe(arm: str, setting: str, folder: Path, options: argparse.Namespace) -> Path:
    from qft.recipe import load

    if options.size == "quickstart":
        values = load(ROOT / "recipes" / "quickstart.yaml").recipe.model_dump(exclude_unset=True, mode="json")
        values.pop("eval")
        values["data"].pop("eval")
        values["data"]["train"] = str(ROOT / "recipes" / "quickstart" / "train.jsonl")
    else:
        _, rows, length, _ = SHAPES[options.size]
        asked = argparse.Namespace(batch=rows, length=length, steps=0, checkpointing=setting == "checkpointed")
        values = modes.recipe("bf16", folder, asked)
        values["train"].pop("optim")
        values["model"] = {"path": str(folder / "model")}
        if options.size == "mixture":
            values["quant"] = {"allow_partial": True}  # with experts in 16 bits, as the other arms have them
    values["train"] |= {
        "max_steps": options.steps + options.warm,
        "save_strategy": "no",
        "report_to": [],
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
    }
    if setting not in ("kept", "checkpointed"):
        values["train"]["gradient_checkpointing"] = "auto"
        values["memory"] = {"budget": f"{setting}GiB"}
    values["train"] |= {"kernels": "auto"} | BY_QFT[arm]
    values["output_dir"] = str(folder / "qft")
    path = folder / "qft.yaml"
    path.write_text(json.dumps(values))
    return path


def of_report(report: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    of_a_step = report["tokens"] / report["steps"]
    seconds = median(of_a_step / rate for step, rate in report["throughput"]["history"] if step > options.warm)
    losses = [row[1] for row in report["loss"]["history"]]
    return {
        "tokens_per_second": of_a_step / seconds,
        "step_seconds": seconds,
        "peak_gib": (report["memory"]["phases"]["train"]["gpu_allocated_bytes"] or 0) / 2**30,
        "loss": sum(losses) / len(losses),
        "tokens": report["tokens"],
        "told": {name: report["settings"].get(name) for name in ("fused_loss", "attention_mask")}
        | {"kernels": report["kernels"], "predicted_gib": (report["memory"]["predicted_peak_bytes"] or 0) / 2**30},
    }


def peer(arm: str, setting: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    model = ARMS[arm](folder, setting == "checkpointed")
    import torch
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    on_gpu, given = torch.cuda.is_available(), json.loads((folder / "ids.json").read_text())
    times: list[float] = []

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = TrainingArguments(
        output_dir=str(folder / arm),
        per_device_train_batch_size=given["rows"],
        max_steps=options.steps + options.warm,
        optim=options.optim if on_gpu else "adamw_torch",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        bf16=True,
        use_cpu=not on_gpu,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1000,
        remove_unused_columns=False,
    )
    rows = Dataset.from_dict({name: given[name] for name in ("input_ids", "labels")})
    trainer = InOrder(
        model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[modes.clock(times, 2)]
    )
    loss = trainer.train().training_loss
    seconds = sorted(b - a for a, b in pairwise(times[options.warm - 1 :]))
    tokens = sum(map(len, given["input_ids"]))
    return {
        "tokens_per_second": tokens / (options.steps + options.warm) / median(seconds),
        "step_seconds": median(seconds),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
        "loss": loss,
        "tokens": tokens,
    }


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Padded on the right to the longest."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> Any:
        return torch.tensor([[*row[name], *[fill] * (longest - len(row[name]))] for row in rows])

    mask = [[int(i < len(row["input_ids"])) for i in range(longest)] for row in rows]
    ids, labels = padded("input_ids", 0), padded("labels", -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.tensor(mask)}


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def plain(folder: Path, checkpointing: bool) -> Any:
    """What one would write without qft."""
    from peft import prepare_model_for_kbit_training

    again = {"use_gradient_checkpointing": checkpointing}
    model = prepare_model_for_kbit_training(
        modes.in_4_bits(folder), **again, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    return with_lora(model)


def liger(folder: Path, checkpointing: bool) -> Any:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    model = modes.in_4_bits(folder)
    _apply_liger_kernel_to_instance(model)  # by its kind; nothing where it knows none
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return with_lora(model)


def unsloth(folder: Path, checkpointing: bool) -> Any:
    os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1"}
    from unsloth import FastLanguageModel

    import torch  # isort: skip

    length = max(map(len, json.loads((folder / "ids.json").read_text())["input_ids"]))
    model, _ = FastLanguageModel.from_pretrained(
        str(folder / "model"), max_seq_length=length, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
    )
    again = "unsloth" if checkpointing else False
    return FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=16,
        lora_dropout=0,
        target_modules=TARGETS,
        use_gradient_checkpointing=again,
        bias="none",
    )


BY_QFT: dict[str, dict[str, Any]] = {"qft": {}, "float8": {"matmul": "fp8"}}
"""What fields of train these arms are told."""
ARMS: dict[str, Any] = {"plain": plain, **dict.fromkeys(BY_QFT), "liger": liger, "unsloth": unsloth}

if __name__ == "__main__":
    main()
