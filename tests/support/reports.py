"""Reports of a training that never was."""

from __future__ import annotations

from typing import Any

from qft.documents.memory import PhaseMemory
from qft.documents.training import (
    Components,
    Evaluation,
    Evaluations,
    Loss,
    Memory,
    ModelPart,
    Phases,
    Report,
    Settings,
    Throughput,
)

GIB = 2**30

PHASE = PhaseMemory(
    gpu_allocated_bytes=60 * GIB,
    gpu_reserved_bytes=65 * GIB,
    gpu_fragmentation_bytes=5 * GIB,
    gpu_inactive_split_bytes=GIB,
    host_resident_bytes=4 * GIB,
    host_measured="system",
)


def report(**changes: object) -> Report:
    """A made-up run on a GPU, in which nothing calls for advice."""
    evaluation = Evaluation(step=0, loss=2.0, perplexity=7.39, tokens=100, rows=10)
    made = Report(
        run="run",
        result="run/adapter",
        model=ModelPart(
            path="org/model",
            architecture="LlamaForCausalLM",
            device="GPU",
            scheme="4bit",
            quant_type="nf4",
            dtype="bfloat16",
            parameters=8_000_000_000,
            trainable_parameters=40_000_000,
            trainable_share=0.005,
            bits_per_weight=5.3,
        ),
        throughput=Throughput(
            tokens_per_second=6000,
            samples_per_second=3,
            step_seconds_p50=1,
            step_seconds_p95=1.1,
            padding_share=0.0,
            history=[(1, 6000.0), (2, 6100.0)],
        ),
        phases=Phases(data=0.0, forward=0.3, backward=0.65, optimizer=0.05),
        memory=Memory(
            peak_gpu_bytes=60 * GIB,
            peak_gpu_reserved_bytes=65 * GIB,
            peak_host_bytes=4 * GIB,
            device_bytes=80 * GIB,
            after_load_bytes=6 * GIB,
            after_first_step_bytes=7 * GIB,
            at_end_bytes=7 * GIB,
            phases={"train": PHASE},
            gpu_allocator="PYTORCH_ALLOC_CONF=expandable_segments:True",
            growing=False,
            history=[(1, 7 * GIB, 60 * GIB), (2, 7 * GIB, 60 * GIB)],
            components=Components(
                base_weights=5 * GIB, trainable_weights=1, gradients=1, optimizer_state=1, activations=50 * GIB
            ),
        ),
        settings=Settings(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            dataloader_num_workers=0,
            dataloader_pin_memory=True,
            tf32_unused=False,
            largest_micro_batch_tokens=4096,
            logits_bytes=2 * GIB,
        ),
        loss=Loss(first=2.0, last=1.0, lowest=0.9, spikes=0, history=[(1, 2.0, 1e-4, 0.5), (2, 1.0, 1e-4, 0.5)]),
        eval=Evaluations(before=evaluation, after=evaluation.model_copy(update={"loss": 1.5})),
        lengths=[(50, 10), (100, 20)],
        steps=30,
        skipped_steps=0,
        samples=60,
        tokens=6000,
        supervised_tokens=3000,
        wall_seconds=60,
        advice=[],
    )
    for path, value in changes.items():
        *parents, name = path.split("__")
        made = replaced(made, parents, name, value)
    return made


def replaced(document: Any, parents: list[str], name: str, value: object) -> Any:
    if parents:
        value, name = replaced(getattr(document, parents[0]), parents[1:], name, value), parents[0]
    return document.model_copy(update={name: value})
