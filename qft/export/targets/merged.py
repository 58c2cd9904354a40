"""16-bit safetensors of base and adapter in one, written one block after the other: the whole is never in memory."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qft.checkpoint.weights import save_tensors, tensors_in, write_index
from qft.export.base import Exporter, Job, Limits, Read
from qft.export.weights import MergedWeights
from qft.files import atomic_folder
from qft.model.load import generation_config, load_base
from qft.plan import plan_folder

__all__ = ["MERGED", "folder_bytes", "load", "merged_config", "merged_folder", "needed_bytes", "write"]

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
    weights = MergedWeights(job)
    for number, tensors in enumerate(weights.groups(), start=-1):
        name = "model-outside" if number < 0 else f"model-block-{number:05}"
        save_tensors(tensors, folder / f"{name}.safetensors")
    write_index(folder)
    merged_config(job, weights).save_pretrained(folder)
    generation_config(job.plan).save_pretrained(folder)
    job.plan.tokenizer.save_pretrained(folder)
    if job.plan.recipe.model.trust_remote_code:
        for path in job.plan.checkpoint.folder.glob("*.py"):
            shutil.copyfile(path, folder / path.name)


def merged_folder(job: Job) -> Path:
    """The merged model in job.scratch, for all targets that start from it; the first one writes it."""
    assert job.scratch is not None
    whole = job.scratch / (job.merge_into or "merged")
    if not whole.exists():
        job.view.note("Merging")
        with atomic_folder(whole) as folder:
            write(job, folder)
    return whole


def merged_config(job: Job, weights: MergedWeights) -> Any:
    """The configuration of the merged model."""
    config = copy.deepcopy(weights.model.config)
    config.dtype, config.architectures = job.dtype, [job.plan.shape.architecture]
    config.tie_word_embeddings = config.tie_word_embeddings and not weights.unties
    return config


def needed_bytes(job: Job) -> int:
    return folder_bytes(MergedWeights(job))


def folder_bytes(weights: MergedWeights) -> int:
    """Of the weights; 16 MiB stand for everything else."""
    return weights.bytes + 2**24


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
