"""16-bit safetensors of base and adapter in one, written one block after the other: the whole is never in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qft.checkpoint.weights import tensors_in
from qft.export.job import Job
from qft.export.targets.base import Exporter, Limits, Read
from qft.files import atomic_folder
from qft.model.load import load_base
from qft.plan import plan_folder

__all__ = ["Merged", "load_folder", "merged_folder"]


class Merged(Exporter):
    engine = library = "transformers"
    limits = Limits(kl=0.01, top1_agreement=0.95, perplexity_increase=0.02)
    limits_original = Limits(kl=0.1, top1_agreement=0.9, perplexity_increase=0.05)
    usage = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

vLLM: `vllm serve FOLDER`.
"""

    def weight_format(self, job: Job) -> str:
        return "merged"

    def needed_bytes(self, job: Job) -> int:
        return job.weights.folder_bytes

    def write(self, job: Job, folder: Path) -> None:
        job.weights.write(folder)

    def load(self, job: Job, folder: Path) -> Any:
        return load_folder(job, folder)

    def reader(self, job: Job, folder: Path) -> Read:
        found = tensors_in(folder.glob("*.safetensors"))

        def read(name: str) -> torch.Tensor | None:
            if name not in found:
                return None
            with safe_open(found[name], framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
            return tensor

        return read


def load_folder(job: Job, folder: Path) -> Any:
    """By transformers, on the run's device. Raises ModelError if it cannot be loaded."""
    return load_base(plan_folder(folder, job.plan.recipe.model, job.dtype)).eval()


def merged_folder(job: Job) -> Path:
    """The merged model in job.scratch, for all targets that start from it; the first one writes it."""
    whole = job.scratch / (job.merge_into or "merged")
    if not whole.exists():
        job.view.note("Merging")
        with atomic_folder(whole) as folder:
            job.weights.write(folder)
    return whole
