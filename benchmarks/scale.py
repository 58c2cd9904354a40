"""Training on several GPUs of one machine: tokens/s, memory of a GPU beside what was predicted, and bytes changed.

    python benchmarks/scale.py                                        a small Llama; on a CPU, processes
    python benchmarks/scale.py --size 1b --batch 4 --length 2048 --gpus 1 2 4
    python benchmarks/scale.py --planted                              whether the bit gate finds what FSDP2 would change
    python benchmarks/scale.py --faults --gpus 4                      a process killed, SIGTERM, and what resumes

Random weights in nf4, LoRA r=16, as many rows on each GPU; `efficiency` is tokens/s a GPU over that of the first arm.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from modes import SIZES, make_inputs


def main() -> None:
    options = options_of(sys.argv[1:])
    if options.worker:
        plant(options.worker)
        return
    with inputs(options) as folder:
        if options.planted:
            told(**caught(folder, options))
        elif options.faults:
            faults(folder, options)
        else:
            arms(folder, options)


def options_of(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=2, help="rows on a GPU in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp2"])
    parser.add_argument("--accumulated", type=int, default=1, help="micro-batches of each GPU in a step")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--planted", action="store_true")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the model is, or is made")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


@contextmanager
def inputs(options: argparse.Namespace) -> Iterator[Path]:
    rows = argparse.Namespace(**vars(options) | {"batch": options.batch * max(options.gpus) * options.accumulated})
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        if not (folder / "rows.jsonl").exists():  # another of these may read it
            make_inputs(folder, rows)
        yield folder


def told(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def recipe(folder: Path, options: argparse.Namespace, gpus: int, strategy: str, **train: Any) -> Path:
    made = {
        "model": {"path": str(folder / "model")},
        "quant": {"preset": "finetune"},
        "data": {"train": str(folder / "rows.jsonl"), "format": "text", "max_length": options.length},
        "train": {
            "max_steps": options.steps,
            "per_device_train_batch_size": options.batch,
            "gradient_accumulation_steps": gpus * options.accumulated,
            "optim": "adamw_torch_fused",
            "gradient_checkpointing": options.checkpointing,
            "save_strategy": "no",
            "report_to": [],
            **train,
        },
        "distributed": {"gpus": gpus, "strategy": strategy} if gpus > 1 else {"strategy": "none"},
        "output_dir": str(folder / f"{strategy}-{gpus}"),
    }
    path = folder / f"{strategy}-{gpus}.yaml"
    path.write_text(json.dumps(made))
    return path


def command(path: Path, *more: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "qft", "train", str(path), "--quiet", *more]


def arms(folder: Path, options: argparse.Namespace) -> None:
    base = None
    for gpus in options.gpus:
        for strategy in options.strategies if gpus > 1 else ["none"]:
            path, began = recipe(folder, options, gpus, strategy), time.perf_counter()
            done = subprocess.run(command(path, "--overwrite"), capture_output=True, text=True, check=False)
            if done.returncode:
                told(gpus=gpus, strategy=strategy, failed=done.returncode, said=done.stderr.strip()[-600:])
                continue
            found = measured(folder / f"{strategy}-{gpus}")
            rate = found["tokens_per_second"] / gpus
            base = base or rate
            efficiency, whole = round(rate / base, 3), round(time.perf_counter() - began, 1)
            told(gpus=gpus, strategy=strategy, efficiency=efficiency, **found, command_seconds=whole)


def measured(run: Path) -> dict[str, Any]:
    report = json.loads((run / "report.json").read_text())
    together, memory, gib = report["distributed"], report["memory"], 2**30
    ranks = together["ranks"] if together else []
    peaks = [rank["train_peak_bytes"] for rank in ranks] or [memory["phases"]["train"]["gpu_allocated_bytes"] or 0]
    phases = report["phases"]
    gate = together and together["bit_gate"]
    return {
        "tokens_per_second": round(report["throughput"]["tokens_per_second"]),
        "step_p50": report["throughput"]["step_seconds_p50"],
        "loss": [round(each[1], 4) for each in report["loss"]["history"]][:: max(report["steps"] // 5, 1)],
        "phase_ms": {name: round(1e3 * report["throughput"]["step_seconds_p50"] * s) for name, s in phases.items()},
        "peak_gib": round(max(peaks) / gib, 2),
        "predicted_gib": round((memory["predicted_peak_bytes"] or 0) / gib, 2),
        "load_gib": round((memory["phases"]["load"]["gpu_allocated_bytes"] or 0) / gib, 2),
        "host_gib": round(memory["peak_host_bytes"] / gib, 2),
        "kernels": (report["kernels"] or {}).get("fused"),
        **({"layers": gate["layers"], "layers_changed": gate["layers_changed"]} if gate else {}),
        **({"gate_seconds": round(gate["seconds"], 3)} if gate else {}),
    }


def caught(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A run whose weights are gathered as accelerate would by itself."""
    path = recipe(folder, options, 2, "fsdp2")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, __file__, "--worker", str(path)], capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if "FSDP2" in line]
    return {"planted": "param_dtype bfloat16", "ended": bool(done.returncode), "said": said[-1:] or done.stderr[-600:]}


def plant(path: Path) -> None:
    """In each process: the policy that a mixed precision of bf16 comes to without qft."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from qft.cli import main as qft
    from qft.training import session

    own = vars(session)["plugin_arguments"]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    vars(session)["plugin_arguments"] = lambda blocks: own(blocks) | {"mixed_precision_policy": policy}
    sys.argv = ["qft", "train", str(path), "--quiet", "--overwrite"]
    qft()


def faults(folder: Path, options: argparse.Namespace) -> None:
    """One rank killed, and SIGTERM to the launcher; each run is resumed on fewer GPUs."""
    gpus = options.gpus[-1]
    for strategy in options.strategies:
        for fault, number in (("a rank killed", signal.SIGKILL), ("the launcher told to end", signal.SIGTERM)):
            path = recipe(folder, options, gpus, strategy, save_strategy="steps", save_steps=2)
            run, began = folder / f"{strategy}-{gpus}-{number.name}", time.perf_counter()
            there = ["--set", f"output_dir={run}"]
            process = subprocess.Popen(command(path, *there), stderr=subprocess.PIPE, text=True)
            while not [*run.glob("checkpoints/checkpoint-[4-9]/qft_checkpoint.json")] and process.poll() is None:
                time.sleep(0.1)
            at = time.perf_counter()
            ranks = [child.pid for child in psutil.Process(process.pid).children() if "RANK" in child.environ()]
            os.kill(ranks[-1] if number == signal.SIGKILL else process.pid, number)
            said = (process.communicate()[1] or "").strip()[-300:]
            code, ended = process.returncode, round(time.perf_counter() - at, 1)
            fewer = ["--set", f"distributed.gpus={gpus // 2}"]
            again = command(path, "--resume", *there, *fewer)
            done = subprocess.run(again, capture_output=True, text=True, check=False)
            result = json.loads((run / "report.json").read_text()) if not done.returncode else {}
            told(
                strategy=strategy,
                fault=fault,
                code=code,
                ended_after_seconds=ended,
                said=said,
                resumed_on=gpus // 2,
                resumed=done.returncode,
                resume_said=done.stderr.strip()[-300:],
                resumed_from=result.get("resumed_from"),
                steps=result.get("steps"),
                seconds=round(time.perf_counter() - began, 1),
            )


if __name__ == "__main__":
    main()
