"""16-bit safetensors of base and adapter in one, written one block after the other: the whole is never in memory."""

from pathlib import Path

from qft.checkpoint.weights import Weights
from qft.export.job import Job
from qft.export.targets.base import Exporter, Limits, Read
from qft.files import atomic_folder


class Merged(Exporter):
    format = "merged"
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

    def needed_bytes(self, job: Job) -> int:
        return job.weights.folder_bytes

    def write(self, job: Job, folder: Path) -> None:
        job.weights.write(folder)

    def reader(self, job: Job, folder: Path) -> Read:
        return Weights(job.plan.checkpoint.written_to(folder), job.weights.model).find


def merged_folder(job: Job) -> Path:
    """The merged model in job.scratch, for all targets that start from it; the first one writes it."""
    whole = job.scratch / (job.merge_into or "merged")
    if not whole.exists():
        job.view.note("Merging")
        with atomic_folder(whole) as folder:
            job.weights.write(folder)
    return whole
