"""Recipes for training the tiny model, and finished runs of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from qft.commands.train import train
from qft.documents.training import Report
from qft.progress import Step, View
from qft.recipe import load
from tests.support.rows import chat, write_jsonl

MODES: dict[str, dict[str, Any]] = {
    "nf4": {"quant": {"preset": "finetune"}},
    "fp4": {"quant": {"preset": "inference"}},
    "8bit": {"quant": {"preset": None, "mode": "8bit"}},
    "bf16": {"quant": None, "model": {"dtype": "bfloat16"}},
    "fp32": {"quant": None, "model": {"dtype": "float32"}},
}

HARD = {"max_steps": 12, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}

HARDER = {"max_steps": 15, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 0.02}


class Leaves(View):
    """Copies the run folder at some steps, before their checkpoints, or notes: as a kill leaves it there."""

    def __init__(self, folder: Path, copies: dict[int | str, str]) -> None:
        self.folder, self.copies = folder, copies

    def step(self, step: Step) -> None:
        self._copy([name for at, name in self.copies.items() if at == step.step])

    def note(self, text: str) -> None:
        self._copy([name for at, name in self.copies.items() if isinstance(at, str) and at in text])

    def _copy(self, names: list[str]) -> None:
        for name in names:
            shutil.copytree(self.folder, self.folder.with_name(name))


def run(path: Path, **options: Any) -> Report:
    return train(load(path), View(), **options)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def trained(folder: Path, base: Path, **sections: Any) -> Path:
    """A run that has learnt its rows, so that its adapter matters."""
    rows = [chat(f"say {i}", f"it is {i * 7} and {i * 13}") for i in range(40)]
    write_jsonl(folder / "rows.jsonl", rows)
    values = {
        "model": {"path": str(base), "device": "cpu"} | sections.pop("model", {}),
        "quant": {"preset": "finetune"},
        "adapter": {"r": 4},
        "data": {"train": "rows.jsonl", "eval_fraction": 0.2, "max_length": 128},
        "train": HARDER | {"report_to": [], "save_strategy": "no", "warmup_steps": 0.0} | sections.pop("train", {}),
        "output_dir": "run",
    } | sections
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
    train(load(path), View())
    return folder / "run"
