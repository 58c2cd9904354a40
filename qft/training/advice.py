"""What the numbers of a report suggest, in sentences that name a field and a figure."""

from collections.abc import Iterator

from qft.documents.training import OutOfMemory, Report

GIB = 2**30


def advise(report: Report) -> list[str]:
    """Advice on a finished run, most useful first."""
    return [*_on_memory(report), *_on_speed(report), *_on_learning(report)]


def _on_memory(report: Report) -> Iterator[str]:
    memory = report.memory
    if report.out_of_memory:
        yield f"Memory ran out, and steps were made again: start with {_settings(report.out_of_memory)}."
    if memory.growing:
        grown = (memory.at_end_bytes - memory.after_first_step_bytes) / GIB
        yield f"Memory grew by {grown:.2f} GiB between the first step and the end: something is not let go."
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


def _settings(events: list[OutOfMemory]) -> str:
    """What holds after them, as a recipe says it."""
    fields = {event.field: str(event.now).lower() for event in events}
    if any("train_batch" in field for field in fields):
        fields["train.gradient_accumulation_steps"] = str(events[-1].gradient_accumulation_steps)
    return ", ".join(f"{field}: {value}" for field, value in fields.items())


def _on_speed(report: Report) -> Iterator[str]:
    if report.phases.data > 0.1:
        yield f"{report.phases.data:.0%} of the time went to preparing batches: raise dataloader_num_workers."
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
