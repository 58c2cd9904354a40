"""What each process of a training measured, and all of them together."""

import platform
from collections.abc import Sequence

from qft.documents.distributed import BitGate, Distributed, RankReport
from qft.training.recorder import Recorder


def of_rank(recorder: Recorder) -> RankReport:
    """What this process measured."""
    phases = recorder.phases()
    peak, train = recorder.peak(phases), phases["train"]
    return RankReport(
        device=recorder.plan.model.device.name,
        host=platform.node(),
        peak_gpu_bytes=peak.gpu,
        peak_gpu_reserved_bytes=peak.gpu_reserved,
        peak_host_bytes=peak.host,
        train_peak_bytes=(train.gpu_allocated_bytes or 0) if recorder.meter.on_gpu else train.host_resident_bytes,
        phase_seconds=dict(recorder.clock.seconds),
        wall_seconds=recorder.wall_seconds(),
    )


def of_all(recorder: Recorder, ranks: Sequence[RankReport]) -> Distributed | None:
    """None: one process trained alone."""
    if len(ranks) < 2:
        return None
    # Whoever is slow computes, while the others wait for its gradients in their backward passes.
    computed = [rank.phase_seconds["forward"] + rank.phase_seconds["data"] for rank in ranks]
    return Distributed(
        strategy=recorder.plan.placement.strategy,
        nodes=recorder.plan.placement.nodes,
        ranks=list(ranks),
        slowest_rank=max(range(len(computed)), key=computed.__getitem__),
        bit_gate=_gate(recorder),
    )


def _gate(recorder: Recorder) -> BitGate | None:
    gate = recorder.gate
    if gate is None:
        return None
    changed = len(gate.changed)
    return BitGate(layers=gate.seen, layers_changed=changed, bytes=gate.bytes, seconds=gate.seconds)
