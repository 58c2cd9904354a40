"""Where the time of a step goes on one GPU and on several: a trace of a few steps of each arm of scale.py.

    python benchmarks/traced.py --size 1b --batch 4 --length 2048 --gpus 1 2

For each arm, in ms a step: the step; what kernels take, without those of NCCL; what NCCL's do; when none of the others
runs; what the host waits in; the longest gaps, with the kernels around them and what the host did; and the kernels
whose time differs most from the first arm's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scale import inputs, options_of, recipe, told

FIRST, STEPS = 14, 4
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpyAsync")
Span = tuple[float, float, str]
"""Beginning and end, in us, and name."""


def main() -> None:
    if sys.argv[1] == "--worker":
        watch(Path(sys.argv[2]))
        return
    options = options_of(sys.argv[1:])
    options.steps = FIRST + STEPS + 6
    first: dict[str, float] = {}
    with inputs(options) as folder:
        for gpus in options.gpus:
            for strategy in options.strategies if gpus > 1 else ["none"]:
                path = recipe(folder, options, gpus, strategy)
                launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
                command = [
                    sys.executable,
                    "-W",
                    "ignore",
                    *(launcher if gpus > 1 else []),
                    __file__,
                    "--worker",
                    str(path),
                ]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                trace = path.with_suffix(".trace.json")
                if done.returncode or not trace.exists():
                    told(gpus=gpus, strategy=strategy, failed=done.returncode, said=done.stderr[-1500:])
                    continue
                report = json.loads((folder / f"{strategy}-{gpus}" / "report.json").read_text())
                found, kernels = read(trace)
                first = first or kernels
                most = sorted(kernels.keys() | first.keys(), key=lambda n: -abs(kernels.get(n, 0) - first.get(n, 0)))
                other = {name[:60]: [round(first.get(name, 0), 2), round(kernels.get(name, 0), 2)] for name in most[:8]}
                each = [
                    round(1e3 * report["tokens"] / report["steps"] / rate, 1)
                    for _, rate in report["throughput"]["history"]
                ]
                told(gpus=gpus, strategy=strategy, step_ms=each, **found, differ=other)


def watch(path: Path) -> None:
    """In each process: train, and have the first one trace some steps."""
    import torch
    from transformers import TrainerCallback

    from qft.cli import main as qft
    from qft.training import session

    class Traced(TrainerCallback):
        def on_step_begin(self, _: Any, state: Any, *args: Any, **kwargs: Any) -> None:
            if state.global_step == FIRST:
                self.profiler = torch.profiler.profile()
                self.profiler.start()

        def on_step_end(self, _: Any, state: Any, *args: Any, **kwargs: Any) -> None:
            if state.global_step == FIRST + STEPS:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self.profiler.stop()
                self.profiler.export_chrome_trace(str(path.with_suffix(".trace.json")))

    if os.environ.get("RANK", "0") == "0":
        own = vars(session)["_callbacks"]
        vars(session)["_callbacks"] = lambda *args: [*own(*args), Traced()]
    sys.argv = ["qft", "train", str(path), "--quiet", "--overwrite"]
    qft()


def read(trace: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Of a trace: what is told of it, and ms a step by kernel."""
    events = [each for each in json.loads(trace.read_text())["traceEvents"] if each.get("ph") == "X"]
    spans = {
        kind: sorted(span(each) for each in events if each.get("cat") == kind)
        for kind in ("kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime", "cpu_op")
    }
    device = sorted([*spans["kernel"], *spans["gpu_memcpy"], *spans["gpu_memset"]])
    of_nccl = [each for each in device if "nccl" in each[2]]
    own = [each for each in device if "nccl" not in each[2]]
    by_name: dict[str, float] = defaultdict(float)
    for start, end, name in device:
        by_name[name] += (end - start) / 1e3 / STEPS
    gaps = [(after[0] - end, end, after) for end, _, after in edges(own) if after[0] > end]
    longest = sorted(gaps, key=lambda gap: -gap[0])[:10]
    waits: dict[str, float] = defaultdict(float)
    for start, end, name in spans["cuda_runtime"]:
        if name in WAITS:
            waits[name] += (end - start) / 1e3 / STEPS
    whole = device[-1][1] - device[0][0]
    return {
        "traced_ms": round(whole / 1e3 / STEPS, 1),
        "kernels_ms": round(sum(end - start for start, end, _ in own) / 1e3 / STEPS, 1),
        "nccl_ms": round(sum(end - start for start, end, _ in of_nccl) / 1e3 / STEPS, 2),
        "nccl": Counter(name[:40] for *_, name in of_nccl),
        "idle_ms": round(sum(gap for gap, *_ in gaps) / 1e3 / STEPS, 1),
        "launches": len(own) // STEPS,
        "host_waits_ms": {name: round(ms, 2) for name, ms in waits.items()},
        "gaps": [
            [round(gap / 1e3, 2), after[2][:40], during(spans["cuda_runtime"] + spans["cpu_op"], end, after[0])]
            for gap, end, after in longest
        ],
    }, dict(by_name)


def span(event: dict[str, Any]) -> Span:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"]), event["name"]


def edges(spans: list[Span]) -> Iterable[tuple[float, str, Span]]:
    """Each span but the first, with the latest end of those before it, and whose that is."""
    end, name = spans[0][1], spans[0][2]
    for each in spans[1:]:
        yield end, name, each
        if each[1] > end:
            end, name = each[1], each[2]


def during(spans: list[Span], start: float, end: float) -> list[str]:
    """What the host was in longest within that time."""
    shares: dict[str, float] = defaultdict(float)
    for begun, ended, name in spans:
        if (share := min(end, ended) - max(start, begun)) > 0:
            shares[name[:40]] += round(share / 1e3, 2)
    return [f"{name} {share:.2f}" for name, share in sorted(shares.items(), key=lambda each: -each[1])[:4]]


if __name__ == "__main__":
    main()
