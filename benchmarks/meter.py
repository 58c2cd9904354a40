"""What measuring memory costs: its share of the steps of a small training, and the seconds of one look at all objects.

python benchmarks/meter.py [--steps 200]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from qft.commands.train import train
from qft.memory.census import take_census
from qft.memory.meter import Meter
from qft.progress import View
from qft.recipe import load
from qft.training.recorder import Recorder
from tests.support.models import byte_tokenizer, tiny_llama
from tests.support.rows import chat, write_jsonl


def timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        started = time.perf_counter()
        result = function(*args)
        spent.append(time.perf_counter() - started)
        return result

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    looks: list[float] = []
    peaks: list[float] = []
    Recorder.look = timed(Recorder.look, looks)  # type: ignore[method-assign]
    Meter.peak = timed(Meter.peak, peaks)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        tiny_llama(hidden_size=256, intermediate_size=512, num_hidden_layers=4).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        write_jsonl(Path(folder, "rows.jsonl"), [chat(f"say {i}", f"it is {i}" * 20) for i in range(64)])
        recipe = {
            "model": {"path": folder},
            "quant": {"preset": "finetune"},
            "data": {"train": "rows.jsonl"},
            "train": {"max_steps": steps, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": []},
            "output_dir": f"{folder}/run",
        }
        Path(folder, "recipe.yaml").write_text(yaml.safe_dump(recipe))
        report = train(load(Path(folder, "recipe.yaml")), View())
    step = report.throughput.step_seconds_p50
    each = statistics.median(looks) + statistics.median(peaks)
    print(f"{each * 1e6:.0f} us of a step of {step * 1e3:.1f} ms: {each / step:.2%}")
    started = time.perf_counter()
    take_census(0)
    print(f"one look at all objects; a run in which memory grew takes 3: {time.perf_counter() - started:.2f} s")
    print(f"longest look of this run: {max(looks):.2f} s")


if __name__ == "__main__":
    main()
