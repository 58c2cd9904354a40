"""What the numbers of a report suggest, in sentences that name a field and a figure."""

from collections.abc import Iterator

from qft.documents.training import Memory, OutOfMemory, Report

GIB = 2**30


def advise(report: Report) -> list[str]:
    """Advice on a finished run, most useful first."""
    return [*_on_memory(report), *_on_speed(report), *_on_learning(report)]


def _on_memory(report: Report) -> Iterator[str]:
    memory = report.memory
    if leak := memory.leak:
        yield f"Memory grew by {_size(leak.bytes_per_100_steps)} in 100 steps, {leak.suspect}: {leak.evidence}."
    if report.out_of_memory:
        yield f"Memory ran out, and steps were made again: start with {_settings(report.out_of_memory)}."
    free = memory.device_bytes - (memory.peak_gpu_reserved_bytes or memory.peak_host_bytes)
    if checkpointing := report.checkpointing:
        saved, cost = checkpointing.saved_bytes, checkpointing.cost_share
        verdict = "try it off" if free > 1.2 * saved else "it is needed"
        yield (
            f"gradient_checkpointing made each step some {cost:.0%} longer and saved {saved / GIB:.1f} GiB; "
            f"{free / GIB:.1f} GiB were free: {verdict}."
        )
    elif memory.peak_gpu_bytes and free > memory.device_bytes / 2:
        yield (
            f"{free / GIB:.0f} GiB of {memory.device_bytes / GIB:.0f} were free: a larger per_device_train_batch_size "
            "with fewer gradient_accumulation_steps gives the same updates with larger products."
        )
    if free < memory.device_bytes / 20:
        yield f"Only {free / GIB:.1f} GiB were free at the peak: a longer batch may not fit."
    yield from _on_logits(report)
    yield from _on_fragmentation(memory)


def _on_logits(report: Report) -> Iterator[str]:
    settings, peak = report.settings, report.memory.peak_gpu_bytes
    if settings is None or settings.logits_bytes <= peak / 4 or not peak:
        return
    rows = settings.per_device_train_batch_size
    smaller = "a smaller per_device_train_batch_size with more gradient_accumulation_steps" if rows > 1 else ""
    if not settings.chunked_loss:
        smaller = "train.chunked_loss: true, where the model allows it,"
    yield (
        f"The logits of one micro-batch ({settings.largest_micro_batch_tokens:,} tokens) take "
        f"{_size(settings.logits_bytes)} in float32, and the loss as much again, of a peak of {_size(peak)}: "
        f"{smaller or 'a lower data.max_length'} takes less."
    )


def _on_fragmentation(memory: Memory) -> Iterator[str]:
    train = memory.phases.get("train")
    idle, reserved = (train and train.gpu_fragmentation_bytes) or 0, (train and train.gpu_reserved_bytes) or 0
    if idle <= max(reserved / 10, GIB):
        return
    expandable = "expandable_segments:True" in (memory.gpu_allocator or "")
    remedy = (
        "group_by_length as train_sampling_strategy" if expandable else "PYTORCH_ALLOC_CONF=expandable_segments:True"
    )
    yield f"The allocator held {_size(idle)} of {_size(reserved)} that no tensor used at its peak: try {remedy}."


def _settings(events: list[OutOfMemory]) -> str:
    """What holds after them, as a recipe says it."""
    fields = {event.field: str(event.now).lower() for event in events}
    if any("train_batch" in field for field in fields):
        fields["train.gradient_accumulation_steps"] = str(events[-1].gradient_accumulation_steps)
    return ", ".join(f"{field}: {value}" for field, value in fields.items())


def _on_speed(report: Report) -> Iterator[str]:
    settings = report.settings
    if report.phases.data > 0.1:
        now = f" ({settings.dataloader_num_workers} now)" if settings else ""
        yield f"{report.phases.data:.0%} of the time went to preparing batches: raise dataloader_num_workers{now}."
    if settings and report.memory.peak_gpu_bytes and not settings.dataloader_pin_memory and report.phases.data > 0.02:
        yield (
            f"{report.phases.data:.0%} of the time went to batches, copied to the GPU from memory that is not "
            "page-locked: set dataloader_pin_memory: auto."
        )
    if settings and settings.tf32_unused:
        yield (
            f"{1 - report.phases.data - report.phases.optimizer:.0%} of the time went to products in float32, without "
            "the TensorFloat-32 that the GPU has: set tf32: auto, or bf16: true."
        )
    if report.throughput.padding_share > 0.2:
        yield (
            f"{report.throughput.padding_share:.0%} of the computed tokens were padding: set train_sampling_strategy: "
            "group_by_length, or a smaller per_device_train_batch_size."
        )
    p50, p95 = report.throughput.step_seconds_p50, report.throughput.step_seconds_p95
    if report.steps >= 20 and p95 > 3 * p50:
        yield f"The slowest steps took {p95 / p50:.1f} times the median: rows differ in length."


def _on_learning(report: Report) -> Iterator[str]:
    before, after = report.eval.before, report.eval.after
    if after is None:
        yield "No rows were held out, so nothing tells whether this generalises: set data.eval_fraction: 0.05."
    elif before and after.loss > before.loss:
        yield f"The held-out loss rose from {before.loss:.3f} to {after.loss:.3f}: take fewer steps."
    best = min(report.eval.history, key=lambda e: e.loss, default=None)
    if best and after and after.loss > best.loss * 1.05:
        yield f"The held-out loss was lowest at step {best.step} ({best.loss:.3f}): set load_best_model_at_end."
    if report.loss.spikes > report.steps * 0.05:
        yield f"{report.loss.spikes} of {report.steps} steps spiked: lower learning_rate or raise the batch."
    if report.skipped_steps:
        yield f"{report.skipped_steps} updates were skipped because a number was not finite: look at their rows."


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"
