"""Tokens/s and peak memory of a base that waits off the GPU (memory.offload), beside one that is on it.

    python benchmarks/offload.py                                    a small Llama on disk, on a CPU
    python benchmarks/offload.py --size 8b --batches 1 2 4 8        the shape of Llama-3 8B in nf4, on a GPU

The model is made once, a block at a time, and each training is a `qft train` in a process of its own: LoRA r=16 on all
linear layers, gradient checkpointing, rows that fill `--length` tokens. `peak_gpu_gib` is what
torch.cuda.max_memory_allocated says of the training, and `reserved_gib` what the allocator took for it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import modes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=modes.SIZES, default="small")
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="rows in a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--offload", nargs="+", choices=["none", "cpu", "disk"], default=None)
    parser.add_argument("--quant", choices=["nf4", "fp4", "8bit", "bf16"], default="nf4")
    parser.add_argument("--folder", type=Path, help="keeps the model, for another call. None: a temporary folder")
    options = parser.parse_args()
    options.batch, options.checkpointing = max(options.batches), True
    with nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.mkdir(exist_ok=True)
        modes.make_inputs(folder, options)
        for batch in options.batches:
            for offload in options.offload or arms():
                told = {"size": options.size, "quant": options.quant, "batch": f"{batch}x{options.length}"}
                print(json.dumps(told | {"offload": offload} | trained(folder, options, batch, offload)), flush=True)


def arms() -> list[str]:
    import torch

    return ["none", "cpu", "disk"] if torch.cuda.is_available() else ["none", "disk"]


def trained(folder: Path, options: argparse.Namespace, batch: int, offload: str) -> dict[str, Any]:
    options.batch = batch
    recipe = modes.recipe(options.quant, folder, options) | {"memory": {"offload": offload}}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "qft", "train", str(path), "--json", "--overwrite"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.returncode, "error": done.stderr.strip().splitlines()[-1:]}
    report = json.loads(done.stdout)
    memory = report["memory"]
    return {
        "tokens_per_second": round(report["throughput"]["tokens_per_second"]),
        "step_seconds": round(report["throughput"]["step_seconds_p50"], 3),
        "peak_gpu_gib": round(memory["peak_gpu_bytes"] / 2**30, 2),
        "reserved_gib": round(memory["peak_gpu_reserved_bytes"] / 2**30, 2),
        "off_the_device_gib": round(memory["offloaded_bytes"] / 2**30, 2),
        "loss": round(report["loss"]["last"], 4),
        "seconds": round(report["wall_seconds"], 1),
    }


if __name__ == "__main__":
    main()
