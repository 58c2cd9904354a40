"""What a training measures, without one."""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qft.commands.train import train
from qft.documents.memory import PhaseMemory
from qft.documents.training import Evaluation, read_report
from qft.memory.meter import Snapshot, larger
from qft.plan import make_plan
from qft.progress import Step, View
from qft.recipe import load
from qft.run.folder import Run
from qft.training.recorder import Recorder
from tests.support.forked import ended
from tests.support.models import byte_tokenizer, tiny_llama
from tests.support.runs import run

GIB = 2**30


def step(number: int, **changes: object) -> Step:
    values = {"loss": 1 / number, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens": 80, "padded_tokens": 100}
    rest = {"supervised_tokens": 50, "rows": 2, "seconds": 2.0, "memory": 7 * GIB, "peak_memory": 20 * GIB}
    return Step(step=number, **values | rest | changes)  # type: ignore[arg-type]


def test_memory_is_the_gpus_where_there_is_one() -> None:
    before, after = Snapshot(True, 2, 4, 100), Snapshot(True, 5, 8, 90)
    assert (after.device, after.beyond(before), before.beyond(after)) == (5, 3, 0)
    before, after = Snapshot(False, 0, 0, 100), Snapshot(False, 0, 0, 130)
    assert (after.device, after.beyond(before), before.beyond(after)) == (130, 30, 0)


def test_the_parts_of_a_resumed_run_share_their_peaks() -> None:
    before, now = {"load": phase(True, 9, 3), "train": phase(True, 5, 8)}, {"train": phase(True, 6, 7)}
    both = larger(before, now)
    assert both["load"] == before["load"]
    assert (both["train"].gpu_allocated_bytes, both["train"].host_resident_bytes) == (6 * GIB, 8 * GIB)


def test_an_evaluation_is_told_with_its_scores(recipe_file: Callable[..., Path]) -> None:
    told: list[str] = []
    view = View()
    view.note = told.append  # type: ignore[method-assign, assignment]
    evaluation = Evaluation(step=4, loss=0.5, perplexity=1.65, tokens=9, rows=3, scores={"exact_match": 0.5})
    Recorder(make_plan(load(recipe_file())), view, 0.0, None).evaluated("step-4", evaluation, [])
    assert told == ["step 4: held-out loss 0.5000, perplexity 1.65, exact match 50.0%"]


def phase(on_gpu: bool, gpu: int, host: int) -> PhaseMemory:
    return PhaseMemory(
        gpu_allocated_bytes=gpu * GIB if on_gpu else None,
        gpu_reserved_bytes=(gpu + 2) * GIB if on_gpu else None,
        gpu_fragmentation_bytes=2 * GIB if on_gpu else None,
        gpu_inactive_split_bytes=GIB if on_gpu else None,
        host_resident_bytes=host * GIB,
        host_measured="system",
    )


@pytest.mark.parametrize(
    ("on_gpu", "activations", "undivided"), [(True, 20 - 5 - 1 - 1 - 2, None), (False, None, 40 - 5 - 1 - 1 - 2)]
)
def test_a_report_is_made_of_what_was_noted(
    on_gpu: bool, activations: int | None, undivided: int | None, recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    recorder = Recorder(make_plan(load(recipe_file())), View(), 0.0, None)
    recorder.meter.on_gpu = on_gpu
    held = {"after_load": (5, 29), "after_adapters": (6, 30), "at_end": (7, 31)}
    recorder.moments |= {name: Snapshot(on_gpu, g * GIB, g * GIB, h * GIB) for name, (g, h) in held.items()}
    # Loading took more than training did.
    recorder.meter.ended = {"load": phase(on_gpu, 22, 4000), "train": phase(on_gpu, 20, 40)}
    recorder.meter._phase = None
    recorder.largest_micro_batch = 100
    recorder.bytes |= {"frozen": 5 * GIB, "trainable": GIB, "gradients": GIB, "optimizer_state": 2 * GIB}
    recorder.recomputed = (3 * GIB, 0.5)
    for made in (step(1), step(2, skipped=True, loss=math.nan), step(3, supervised_tokens=20)):
        recorder.step(made)

    report = recorder.report(Run(tmp_path / "run"), tmp_path / "run" / "adapter")
    parts = report.memory.components
    assert parts.activations == (None if activations is None else activations * GIB)
    assert parts.undivided == (None if undivided is None else undivided * GIB)
    assert report.memory.peak_host_bytes == 4000 * GIB
    assert report.memory.peak_gpu_bytes == (22 * GIB if on_gpu else 0)
    assert report.memory.peak_gpu_reserved_bytes == (24 * GIB if on_gpu else 0)
    assert report.memory.moments["after_load"].host_resident_bytes == 29 * GIB
    assert report.memory.moments["after_load"].gpu_allocated_bytes == (5 * GIB if on_gpu else None)
    assert (report.memory.gpu_allocator is None) is not on_gpu
    assert report.settings is not None
    assert report.settings.logits_bytes == 100 * 264 * 4
    assert report.memory.components.gradients == GIB
    assert report.memory.components.optimizer_state == 2 * GIB
    assert report.memory.after_load_bytes == (6 if on_gpu else 30) * GIB
    assert report.memory.at_end_bytes == (7 if on_gpu else 31) * GIB
    assert report.memory.after_first_step_bytes == 7 * GIB
    assert (report.steps, report.skipped_steps, report.supervised_tokens) == (3, 1, 120)
    assert report.throughput.tokens_per_second == 40
    assert report.checkpointing is not None
    assert report.checkpointing.cost_share == pytest.approx(0.5 / 1.5)
    assert (report.eval.before, report.eval.after, report.eval.history) == (None, None, [])


def tell_peak(recipe: Path) -> None:
    """What the system says of a process that trains, in bytes."""
    if not (child := os.fork()):
        try:
            train(load(recipe), View())
        finally:
            os._exit(0)
    sys.stdout.write(str(os.wait4(child, 0)[2].ru_maxrss * 1024))


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in bytes elsewhere")
def test_the_peak_of_the_host_is_what_the_system_says(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """With weights of which loading, to hold them in 4 bits, takes more than all that follows."""
    tiny_llama(vocab_size=400, hidden_size=1024, intermediate_size=6144).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    train_section = {"max_steps": 1, "gradient_accumulation_steps": 1}
    path = recipe_file(model={"path": str(tmp_path / "model"), "dtype": "float32"}, train=train_section)
    done = ended(functools.partial(tell_peak, path))
    memory = read_report(tmp_path / "run").memory
    told = int(done.stdout)
    # The process lives on behind its report: once in a suite it took 96 KiB more.
    assert told - 2**20 < memory.peak_host_bytes < 1.01 * told
    assert max(phase.host_resident_bytes for phase in memory.phases.values()) > 0.97 * told
    assert memory.phases["load"].host_measured == "system"
    assert memory.phases["load"].host_resident_bytes > memory.moments["before_load"].host_resident_bytes + 2**27


def test_a_resumed_run_reports_the_evaluation_before_its_first_step(
    recipe_file: Callable[..., Path], chat_file: Path
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    data = {"eval": str(chat_file)}
    first = run(recipe_file(train=settings | {"max_steps": 1}, data=data))
    resumed = run(recipe_file(train=settings | {"max_steps": 3}, data=data), resume=True)
    assert first.eval.before is not None
    assert resumed.eval.before == first.eval.before
    assert [evaluation.step for evaluation in resumed.eval.history] == [1, 2, 3]
    assert resumed.eval.after is not None
    assert resumed.eval.after.step == 3
