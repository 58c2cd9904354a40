"""Memory of trainings on rows with images: what the plan says, beside what a GPU is measured to take.

    python benchmarks/images.py [FAMILY ...]

Random weights in the shape of a small model of the family, nf4 with LoRA, images of one size; of each, a line with
predicted and measured bytes. Needs a GPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers import AutoConfig, AutoModelForImageTextToText  # noqa: E402

from qft.commands.train import train  # noqa: E402
from qft.machine.environment import prepare_libraries  # noqa: E402
from qft.progress import View  # noqa: E402
from qft.recipe import load  # noqa: E402
from tests.support.pictures import picture, write_seeing_model  # noqa: E402

TEXT = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
TEXT |= {"num_key_value_heads": 4, "head_dim": 64}
TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


def main() -> None:
    warnings.filterwarnings("ignore")
    prepare_libraries()
    for family in sys.argv[1:] or ["llava", "gemma3", "idefics3"]:
        for settings in ({"gradient_checkpointing": False}, {"gradient_checkpointing": True}):
            with tempfile.TemporaryDirectory() as folder:
                print(family, json.dumps(settings), measured(Path(folder), family, settings), flush=True)


def measured(folder: Path, family: str, settings: dict[str, Any]) -> str:
    base = folder / "base"
    write_seeing_model(base, family)
    config = json.loads((base / "config.json").read_text())
    config["text_config"] |= TEXT
    config["vision_config"] |= TOWER
    (base / "config.json").write_text(json.dumps(config))
    larger = AutoConfig.from_pretrained(base)
    AutoModelForImageTextToText.from_config(larger, dtype=torch.bfloat16).save_pretrained(base)
    report = train(load(recipe(folder, base, settings)), View())
    plan = json.loads((folder / "run" / "plan.json").read_text())
    predicted, found = plan["memory"]["predicted_peak_bytes"], report.memory.peak_gpu_bytes
    return f"predicted {predicted:,} measured {found:,} {predicted / found - 1:+.2%} {plan['memory']['peaks']}"


def recipe(folder: Path, base: Path, settings: dict[str, Any]) -> Path:
    """Of sixteen rows, each of three images."""
    picture("red").save(folder / "red.png")
    images = [{"type": "image", "image": "red.png"}] * 3
    question = {"role": "user", "content": [*images, {"type": "text", "text": "what is it? " * 20}]}
    row = json.dumps({"messages": [question, {"role": "assistant", "content": "it is red"}]})
    (folder / "rows.jsonl").write_text(f"{row}\n" * 16)
    values = {
        "model": {"path": str(base)},
        "quant": {"preset": "finetune"},
        "adapter": {"r": 8},
        "data": {"train": "rows.jsonl", "max_length": 512},
        "train": {"max_steps": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
                  "report_to": [], "save_strategy": "no", **settings},
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


if __name__ == "__main__":
    main()
