"""The adapter in peft's layout, with the tokenizer that it was trained with."""

import shutil
from pathlib import Path
from typing import Any

from qft.export.job import Job
from qft.export.targets.base import Exporter, Limits
from qft.model.adapter import with_adapter
from qft.model.handover import require_possible
from qft.model.target import load_target


class Adapter(Exporter):
    engine = library = "peft"
    limits = limits_original = Limits(kl=0.001, top1_agreement=0.99, perplexity_increase=0.002)
    usage = """\
```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")  # finds the base by itself
```

vLLM: `vllm serve BASE --enable-lora --lora-modules mine=FOLDER`. It was trained on a base in SCHEME: on other base
weights it is not quite the same model.
"""

    def weight_format(self, job: Job) -> str:
        require_possible("adapter", job)
        section = job.loaded.recipe.adapter
        special = ", with DoRA or modules_to_save" if section.use_dora or section.modules_to_save else ""
        return f"adapter on a {job.plan.scheme.weight_format} base{special}"

    def needed_bytes(self, job: Job) -> int:
        return sum(p.stat().st_size for p in job.adapter.iterdir()) if job.adapter else 0

    def write(self, job: Job, folder: Path) -> None:
        """Copy the adapter and write the tokenizer."""
        assert job.adapter is not None
        for path in job.adapter.iterdir():
            if path.is_file() and path.name != "README.md":
                shutil.copyfile(path, folder / path.name)
        job.plan.checkpoint.save_reader(job.plan.tokenizer, folder)

    def load(self, job: Job, folder: Path) -> Any:
        """On the base as it was trained."""
        return with_adapter(load_target(job.without_adapter(), job.plan), folder).eval()
