"""Tokens a second of rows of mixed lengths: padded, grouped by length, packed, and laid side by side.

    python benchmarks/packing.py [--hidden 1024] [--layers 16] [--rows 512] [--steps 12]

A random Llama with LoRA on a base in 4 bits; rows of 16 to 2,048 tokens, log-normal about 200. Prints, of each way, the
tokens a second that are no padding, the share of padding, and the loss of the first step.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from qft.commands.train import train
from qft.progress import View
from qft.recipe import load
from tests.support.models import byte_tokenizer

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "padded": ({}, {}),
    "grouped by length": ({}, {"train_sampling_strategy": "group_by_length"}),
    "packed": ({"packing": True}, {"per_device_train_batch_size": 2}),
    "padding-free": ({"padding_free": True}, {}),
}


def write(folder: Path, hidden: int, layers: int, rows: int) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": max(hidden // 256, 1)}
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=2048, **shape, **heads, eos_token_id=2)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as stream:
        for _ in range(rows):
            length = min(max(int(draw.lognormvariate(5.3, 0.9)), 16), 1980)
            turns = ("user", "Go on."), ("assistant", "".join(draw.choices("abcdefgh ", k=length)) + ".")
            stream.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")


def measured(folder: Path, name: str, steps: int) -> None:
    data, settings = WAYS[name]
    recipe = {
        "model": {"path": str(folder / "model")},
        "quant": {"preset": "finetune"},
        "adapter": {"r": 16},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 2048, **data},
        "train": {
            "max_steps": steps,
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            **settings,
        },
        "output_dir": str(folder / name.replace(" ", "-")),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    report = train(load(path), View())
    speed, rows = report.throughput, report.samples / report.steps
    print(
        f"{name:>18}: {speed.tokens_per_second:10,.0f} tokens/s, {speed.padding_share:6.1%} padding, {rows:5.1f} rows "
        f"a step, loss {report.loss.first:.4f}, peak {(report.memory.peak_gpu_bytes or 0) / 2**30:.2f} GiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("hidden", 1024), ("layers", 16), ("rows", 512), ("steps", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        write(Path(made), asked.hidden, asked.layers, asked.rows)
        for name in WAYS:
            measured(Path(made), name, asked.steps)


if __name__ == "__main__":
    main()
