"""The adapter in peft's layout, with the tokenizer that it was trained with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from qft.errors import RecipeError
from qft.export.base import Exporter, Job, Limits
from qft.model.adapter import with_adapter
from qft.model.target import load_target

__all__ = ["ADAPTER"]

USAGE = """\
```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")  # finds the base by itself
```

vLLM: `vllm serve BASE --enable-lora --lora-modules mine=FOLDER`. It was trained on a base in SCHEME: on other base
weights it is not quite the same model.
"""


def write(job: Job, folder: Path) -> None:
    """Copy the adapter and write the tokenizer. Raises RecipeError for a run that trained all weights."""
    if job.adapter is None:
        raise RecipeError(f"{job.run.folder}: trained all weights and has no adapter; export --to merged")
    for path in job.adapter.iterdir():
        if path.is_file() and path.name != "README.md":
            shutil.copyfile(path, folder / path.name)
    job.plan.tokenizer.save_pretrained(folder)


def needed_bytes(job: Job) -> int:
    return sum(p.stat().st_size for p in job.adapter.iterdir()) if job.adapter else 0


def load(job: Job, folder: Path) -> Any:
    """On the base as it was trained."""
    return with_adapter(load_target(job.without_adapter(), job.plan), folder).eval()


ADAPTER = Exporter(
    write=write,
    needed_bytes=needed_bytes,
    load=load,
    engine="peft",
    merges=False,
    regrids=False,
    limits=Limits(kl=0.001, top1_agreement=0.99, perplexity_increase=0.002),
    limits_original=Limits(kl=0.001, top1_agreement=0.99, perplexity_increase=0.002),
    library="peft",
    usage=USAGE,
)
