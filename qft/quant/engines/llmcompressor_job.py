"""Quantizes one model by llm-compressor, as one JSON file says: python -I llmcompressor_job.py JOB.json

Run by the Python of calibrate.engine_python, so that it imports nothing of qft. The job's fields:

    model, dtype, trust_remote_code   a folder of safetensors with config.json, and how it is loaded
    windows           JSON lines with input_ids, all of one length
    algorithm         gptq, awq, or smoothquant (SmoothQuant, then GPTQ)
    scheme            data_type, bits, group_size (-1: a row), symmetric, activations (none, dynamic, static)
    ignore            names of the linear layers to leave as they are
    seed
    output            the folder to write: compressed-tensors
    report            a JSON file to write once that is done: versions, peak_bytes, peak_host_bytes
"""

import json
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, set_seed

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")
SMOOTHING = 0.8
"""How much of the activations' range moves into the weights: as in llm-compressor's own examples of W8A8."""


def main(path: str) -> None:
    job = json.loads(Path(path).read_text("utf-8"))
    before = _host_bytes()
    set_seed(job["seed"])
    if not torch.accelerator.is_available():
        # Its AWQ (0.14) pins memory for faster copies to a GPU, and fails where there is none.
        IntermediatesCache.pin_memory = lambda *_: None
    model = AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=getattr(torch, job["dtype"]),
        trust_remote_code=job["trust_remote_code"],
        use_safetensors=True,
    )
    windows = [json.loads(line)["input_ids"] for line in Path(job["windows"]).read_text("utf-8").splitlines()]
    oneshot(
        model=model,
        dataset=Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows]),
        recipe=modifiers(job),
        num_calibration_samples=len(windows),
        max_seq_length=len(windows[0]),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(job["output"], save_compressed=True)
    Path(job["report"]).write_text(json.dumps(_report(before)), "utf-8")


def modifiers(job: dict[str, Any]) -> list[Any]:
    """llm-compressor's recipe of a job."""
    quantized = {"config_groups": {"group_0": _group(job["scheme"])}, "ignore": job["ignore"]}
    if job["algorithm"] == "awq":
        return [AWQModifier(), QuantizationModifier(**quantized)]
    smoothed = [SmoothQuantModifier(smoothing_strength=SMOOTHING)] if job["algorithm"] == "smoothquant" else []
    return [*smoothed, GPTQModifier(**quantized)]


def _group(scheme: dict[str, Any]) -> dict[str, Any]:
    size, kind = scheme["group_size"], scheme["data_type"]
    scales = {"strategy": "channel", "group_size": None} if size < 0 else {"strategy": "group", "group_size": size}
    weights = {"num_bits": scheme["bits"], "type": kind, "symmetric": scheme["symmetric"], **scales}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if scheme["activations"] != "none":
        dynamic = scheme["activations"] == "dynamic"
        strategy = "token" if dynamic else "tensor"
        inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": dynamic}
        group["input_activations"] = inputs
    return group


def _report(before: int) -> dict[str, Any]:
    host = _host_bytes()
    on_gpu = torch.cuda.is_available()
    peak = sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))) if on_gpu else host - before
    return {"versions": {name: version(name) for name in PACKAGES}, "peak_bytes": peak, "peak_host_bytes": host}


def _host_bytes() -> int:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(sys.argv[1])
