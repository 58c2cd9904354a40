"""One model type, tiny and random, through all that qft does with a model: checked, trained, merged, exported."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from qft.checkpoint.stored import stored_tensors
from qft.commands.check import planned
from qft.commands.train import train
from qft.documents.plan import PlanDocument
from qft.errors import QftError
from qft.export import ExportOptions, export
from qft.machine.device import absent_gpu
from qft.plan import make_plan
from qft.progress import View
from qft.recipe import load
from tests.support.rows import chat, write_jsonl
from tests.support.tiny import tiny_model, write_tiny_model

STEPS = 4
ON_GPU = ("model.device=auto", "model.dtype=bfloat16", "quant.compute_dtype=bfloat16")
HELD = {"preset": "finetune", "compute_dtype": "float32"}


@dataclass
class Swept:
    """What became of one type."""

    kind: str
    architecture: str = ""
    made: str | None = None
    """Why it could not be made tiny, or computes nothing from text where transformers alone asks it; None: it does."""
    share: float | None = None
    """Of the weights outside embeddings and head, those that nf4 holds."""
    partial: bool = False
    """Whether that had to be allowed."""
    refused: str | None = None
    """By `qft check`, before the training; None: it was trained."""
    unmerged: str | None = None
    """Why `qft check` says that it cannot be merged; None: it was."""
    unforeseen: str | None = None
    """Why what its training would take on a GPU is not known beforehand; None: it is."""
    failed: str | None = None
    """What should not be: an error after the check, or one that is no message."""
    differences: list[str] = field(default_factory=list)
    """Tensors of the merged folder that the original did not have, or has and this does not, or of another shape."""

    @property
    def is_sound(self) -> bool:
        """Whether it was handed over as it should be, or refused before the training."""
        return not (self.failed or self.differences)


def swept(kind: str, folder: Path, *, made: bool = False) -> Swept:
    """Everything, in an empty folder. `made`: transformers is not asked first whether it can compute with it."""
    found = Swept(kind)
    try:
        if not made:
            _try(kind)
        base = write_tiny_model(folder / "base", kind)
    except Exception as error:  # a type that transformers cannot make or run is none of ours
        found.made = f"{type(error).__name__}: {_line(error)}"
        return found
    try:
        _handed_over(found, folder, base)
    except QftError as error:
        found.failed = f"{type(error).__name__} after the check: {_line(error)}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/qft/" in frame.filename][-1:]
        places = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in [*own, where])
        found.failed = f"{type(error).__name__}: {_line(error)} ({places})"
    return found


def _try(kind: str) -> None:
    """A step of transformers alone."""
    model, ids = tiny_model(kind).train(), torch.arange(3, 27).reshape(1, -1)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()


def _handed_over(found: Swept, folder: Path, base: Path) -> None:
    recipe = write_recipe(folder, base)
    try:
        plan = _plan(recipe)
    except QftError as error:
        if "allow_partial" not in str(error):
            found.refused = _line(error)
            return
        found.partial, recipe = True, write_recipe(folder, base, quant=HELD | {"allow_partial": True})
        try:
            plan = _plan(recipe)
        except QftError as other:
            found.refused = _line(other)
            return
    found.architecture, found.share = plan.model.architecture, plan.quantization.quantized_share
    found.unmerged = plan.exports["merged"]
    found.unforeseen = make_plan(load(recipe, ON_GPU), absent_gpu(2**34)).memory.unknown
    train(load(recipe), View())
    if found.unmerged is None:
        document = export(folder / "run", ExportOptions(to=("merged",)), View())[0]
        found.differences = differences(base, Path(document.path))


def _plan(recipe: Path) -> PlanDocument:
    plan = planned(load(recipe))
    assert plan.kind == "plan"
    return plan


def write_recipe(folder: Path, base: Path, **sections: Any) -> Path:
    """Of a LoRA finetuning in nf4 of a few steps."""
    write_jsonl(folder / "rows.jsonl", [chat(f"say {i}", f"it is {i * 7}") for i in range(16)])
    values: dict[str, Any] = {
        # In float32, so that the gate tells of anything but rounding.
        "model": {"path": str(base), "device": "cpu", "dtype": "float32"},
        "quant": HELD,
        "adapter": {"r": 4},
        "data": {"train": "rows.jsonl", "eval_fraction": 0.25, "max_length": 64},
        "train": {"max_steps": STEPS, "learning_rate": 0.01, "per_device_train_batch_size": 4,
                  "gradient_accumulation_steps": 1, "report_to": [], "save_strategy": "no", "warmup_steps": 0.0},
        "output_dir": str(folder / "run"),
    } | sections  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def differences(base: Path, merged: Path) -> list[str]:
    """How names and shapes of the tensors of two folders differ."""
    before, after = ({n: s.shape for n, s in stored_tensors(path).items()} for path in (base, merged))
    lost, new = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    other = sorted(name for name in before.keys() & after.keys() if before[name] != after[name])
    return [*(f"-{name}" for name in lost), *(f"+{name}" for name in new), *(f"~{name}" for name in other)]


PLACE = re.compile(r"\S*/(base|recipe\.yaml(:\d+)?|run/\S+): ")
"""Where in a temporary folder something is the matter."""


def _line(error: BaseException) -> str:
    return PLACE.sub("", " ".join(str(error).split()))[:300]
