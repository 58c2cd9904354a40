"""Memory that runs out: the step is made again with less at once, and what is learnt is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from qft.commands.train import train
from qft.documents.training import OutOfMemory, Report
from qft.errors import OutOfMemoryError
from qft.progress import Step, View
from qft.recipe import load
from tests.support.architectures import write_model
from tests.support.memory import above, exhaust, exhausted, times
from tests.support.rows import chat, write_jsonl
from tests.support.runs import adapter, run

RecipeFile = Callable[..., Path]
Failing = Callable[[], AbstractContextManager[None]]

ROWS, CHECKPOINTING = "train.per_device_train_batch_size", "train.gradient_checkpointing"
EVAL_ROWS = "train.per_device_eval_batch_size"
TRAIN = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 5,
    "learning_rate": 1e-3,
    "report_to": [],
}


class Told(View):
    """Keeps what is told; ends the process, as it were, at a step."""

    def __init__(self, end: int | None = None) -> None:
        self.end, self.notes, self.steps = end, list[str](), list[Step]()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, step: Step) -> None:
        self.steps.append(step)
        if step.step == self.end:
            raise KeyboardInterrupt


@pytest.fixture
def recipe(recipe_file: RecipeFile, tmp_path: Path) -> RecipeFile:
    """Writes a recipe of 22 rows of many lengths, in float32, into the run folder that it is told."""
    lengths = (1, 9, 2, 12, 5, 20, 3, 7, 15, 4, 11, 6, 18, 8, 13, 10, 2, 16, 14, 1, 17, 19)
    rows = [chat(f"count {n}", " ".join(map(str, range(n)))) for n in lengths]
    data = {"train": str(write_jsonl(tmp_path / "uneven.jsonl", rows))}
    write_jsonl(tmp_path / "held.jsonl", rows[:7])

    def write(folder: str = "run", **sections: Any) -> Path:
        held = {"eval": str(tmp_path / "held.jsonl")} if sections.pop("held_out", False) else {}
        train_section = TRAIN | sections.pop("train", {})
        wanted: dict[str, Any] = {"model": {"dtype": "float32"}, "quant": None, "data": data | held}
        wanted |= {"train": train_section, "output_dir": str(tmp_path / folder)} | sections
        return recipe_file(f"{folder}.yaml", **wanted)

    return write


@contextmanager
def optimizer_fails(*calls: int, after: bool = False) -> Iterator[None]:
    """Memory runs out in those steps of the optimizer, counted from 1: before it has done anything, or when it has
    changed everything."""
    made = [0]

    def hook(*_: Any) -> None:
        made[0] += 1
        if made[0] in calls:
            exhaust()

    handle = (register_optimizer_step_post_hook if after else register_optimizer_step_pre_hook)(hook)
    try:
        yield
    finally:
        handle.remove()


def changes(report: Report) -> list[tuple[int, str, str, int | bool, int]]:
    return [(e.step, e.phase, e.field, e.now, e.gradient_accumulation_steps) for e in report.out_of_memory]


def assert_equal(one: Report, other: Report, **tolerance: float) -> None:
    """The same rows in the same steps, and what was learnt of them, but for float error."""
    for mine, others in zip(one.loss.history, other.loss.history, strict=True):
        assert mine == pytest.approx(others, rel=1e-5)
    for name in ("steps", "samples", "tokens", "supervised_tokens", "skipped_steps"):
        assert getattr(one, name) == getattr(other, name), name
    weights = adapter(Path(one.run))
    for name, tensor in adapter(Path(other.run)).items():
        torch.testing.assert_close(weights[name], tensor, **{"rtol": 1e-4, "atol": 1e-5} | tolerance)


BLOCKS = 2
"""Each pass of training is counted in both blocks."""
CASES: dict[str, tuple[Failing, list[tuple[int, str, str, int | bool, int]]]] = {
    "first step": (lambda: exhausted(above(2)), [(1, "forward", ROWS, 2, 4)]),
    "backward": (lambda: exhausted(above(2), phase="backward"), [(1, "backward", ROWS, 2, 4)]),
    "several in a row": (lambda: exhausted(above(1)), [(1, "forward", ROWS, 2, 4), (1, "forward", ROWS, 1, 8)]),
    # The second block of the second micro-batch of the second step: one was passed, and its gradients are dropped.
    "later, within accumulation": (lambda: exhausted(times(8)), [(2, "forward", ROWS, 2, 4)]),
    "backward, within accumulation": (
        lambda: exhausted(times(BLOCKS * 3 + 1), phase="backward"),
        [(2, "backward", ROWS, 2, 4)],
    ),
    "until checkpointed": (
        lambda: exhausted(times(1, 2, 3)),
        [(1, "forward", ROWS, 2, 4), (1, "forward", ROWS, 1, 8), (1, "forward", CHECKPOINTING, True, 8)],
    ),
    "optimizer, first step": (lambda: optimizer_fails(1), [(1, "optimizer", ROWS, 2, 4)]),
    "optimizer, its state is made": (lambda: optimizer_fails(1, after=True), [(1, "optimizer", ROWS, 2, 4)]),
    "optimizer, later": (lambda: optimizer_fails(3, 4), [(3, "optimizer", ROWS, 2, 4), (3, "optimizer", ROWS, 1, 8)]),
}


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Report]:
    """The report of the run in which nothing fails, once it was made."""
    return {}


@pytest.mark.parametrize("case", CASES)
def test_what_is_learnt_is_what_would_have_been(case: str, recipe: RecipeFile) -> None:
    failing, expected = CASES[case]
    whole = run(recipe("whole"))
    assert whole.out_of_memory == []
    view = Told()
    with failing():
        report = train(load(recipe()), view)
    assert_equal(report, whole)
    assert changes(report) == expected
    assert [event.asked_bytes for event in report.out_of_memory] == [1 << 60] * len(expected)
    assert [note for note in view.notes if "out of memory" in note] == [e.told() for e in report.out_of_memory]
    assert any("Memory ran out" in line for line in report.advice)
