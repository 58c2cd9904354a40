"""Steps -> the figures of a report."""

import math
import statistics
from itertools import pairwise

from qft.documents.training import Checkpointing, Loss, Throughput
from qft.errors import QftError
from qft.progress import Step


def throughput(steps: list[Step]) -> Throughput:
    timed = steps[1:] or steps  # the first step also allocates, and compiles kernels
    seconds = sum(step.seconds for step in timed)
    each = sorted(step.seconds for step in timed)
    return Throughput(
        tokens_per_second=sum(step.tokens for step in timed) / seconds,
        samples_per_second=sum(step.rows for step in timed) / seconds,
        step_seconds_p50=statistics.median(each),
        step_seconds_p95=each[min(len(each) - 1, math.ceil(len(each) * 0.95) - 1)],
        history=[(step.step, step.tokens / step.seconds) for step in steps],
        padding_share=1 - sum(step.tokens for step in steps) / sum(step.padded_tokens for step in steps),
    )


def loss(steps: list[Step]) -> Loss:
    taken = [step for step in steps if not step.skipped]
    losses = [step.loss for step in taken]
    if not losses:
        raise QftError("every update was skipped because a number was not finite: nothing was learnt")
    tail = losses[-max(len(losses) // 10, 1) :]
    return Loss(
        first=losses[0],
        last=statistics.fmean(tail),
        lowest=min(losses),
        spikes=spikes(losses),
        history=[(step.step, step.loss, step.learning_rate, step.grad_norm) for step in taken],
    )


def checkpointing(saved_bytes: int, seconds: float, steps: list[Step]) -> Checkpointing:
    """From the bytes saved, and the seconds that computing the blocks again takes in one step."""
    step = statistics.median(step.seconds for step in steps)
    return Checkpointing(saved_bytes=saved_bytes, cost_share=seconds / max(step - seconds, seconds))


def spikes(losses: list[float]) -> int:
    """Steps that rose by more than four times the median change."""
    changes = [b - a for a, b in pairwise(losses)]
    if len(changes) < 8:
        return 0
    usual = statistics.median(abs(change) for change in changes)
    return sum(change > 4 * usual for change in changes)
