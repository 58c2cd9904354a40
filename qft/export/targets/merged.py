"""16-bit safetensors of base and adapter in one, written one block after the other: the whole is never in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qft.checkpoint.weights import tensors_in
from qft.export.base import Exporter, Job, Limits, Read
from qft.files import atomic_folder
from qft.model.load import load_base
from qft.plan import plan_folder

__all__ = ["MERGED", "load", "merged_folder", "needed_bytes", "write"]

USAGE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

vLLM: `vllm serve FOLDER`.
"""


def write(job: Job, folder: Path) -> None:
    """One safetensors file for each block and one for the rest, configuration and tokenizer."""
    job.weights.write(folder)


def merged_folder(job: Job) -> Path:
    """The merged model in job.scratch, for all targets that start from it; the first one writes it."""
    assert job.scratch is not None
    whole = job.scratch / (job.merge_into or "merged")
    if not whole.exists():
        job.view.note("Merging")
        with atomic_folder(whole) as folder:
            write(job, folder)
    return whole


def needed_bytes(job: Job) -> int:
    return job.weights.folder_bytes


def load(job: Job, folder: Path) -> Any:
    """By transformers, on the run's device. Raises ModelError if it cannot be loaded."""
    return load_base(plan_folder(folder, job.plan.recipe.model, job.dtype)).eval()


def reader(job: Job, folder: Path) -> Read:
    found = tensors_in(folder.glob("*.safetensors"))

    def read(name: str) -> torch.Tensor | None:
        if name not in found:
            return None
        with safe_open(found[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    return read


MERGED = Exporter(
    write=write,
    needed_bytes=needed_bytes,
    load=load,
    engine="transformers",
    merges=True,
    regrids=False,
    limits=Limits(kl=0.01, top1_agreement=0.95, perplexity_increase=0.02),
    limits_original=Limits(kl=0.1, top1_agreement=0.9, perplexity_increase=0.05),
    library="transformers",
    usage=USAGE,
    reader=reader,
)
