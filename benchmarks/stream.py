"""A training from a file ten times as large as what the process may take: data.streaming.

    python benchmarks/stream.py [--megabytes 640] [--steps 20]

Once the tiny model and its libraries are loaded, the process may map a tenth of the file's size more, by RLIMIT_DATA.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import psutil
import yaml

from qft.commands.train import train
from qft.progress import View
from qft.recipe import load
from tests.support.models import byte_tokenizer, tiny_llama

MIB = 2**20


def recipe(folder: Path, rows: str, steps: int, *, streaming: bool) -> Path:
    values = {
        "model": {"path": str(folder / "model"), "device": "cpu"},
        "adapter": {"r": 4},
        "data": {"train": str(folder / rows), "max_length": 128, "on_too_long": "truncate", "streaming": streaming},
        "train": {"max_steps": steps, "save_strategy": "no", "report_to": []},
        "output_dir": str(folder / f"{rows}-{streaming}"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=640)
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder, text = Path(made), "all of it " * 400
        tiny_llama().save_pretrained(folder / "model")
        byte_tokenizer().save_pretrained(folder / "model")
        for name, size in (("few.jsonl", 1), ("many.jsonl", asked.megabytes)):
            with (folder / name).open("w") as stream:
                for number in range(size * MIB // 4020):
                    stream.write(json.dumps({"text": f"{number} {text}"}) + "\n")
        train(load(recipe(folder, "few.jsonl", 2, streaming=True)), View())
        process = psutil.Process()
        before, limit = process.memory_info(), asked.megabytes * MIB // 10
        most = process.memory_info().data + limit
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        started = time.perf_counter()
        report = train(load(recipe(folder, "many.jsonl", asked.steps, streaming=True)), View())
        grown = (process.memory_info().rss - before.rss) / MIB
        print(
            f"{(folder / 'many.jsonl').stat().st_size / MIB:,.0f} MiB of rows, and {limit / MIB:.0f} MiB to take: "
            f"{report.steps} steps in {time.perf_counter() - started:.1f} s, {grown:.0f} MiB more in memory",
            flush=True,
        )


if __name__ == "__main__":
    main()
