"""A signal lets the step be finished and a checkpoint be written, from which the run comes to the same to the bit."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qft.commands.train import train
from qft.documents.training import Report
from qft.errors import Interrupted
from qft.machine.signals import SIGNALS
from qft.progress import Step, View
from qft.recipe import load
from tests.support.forked import command, fork
from tests.support.rows import chat, write_jsonl
from tests.support.runs import HARD, adapter, run

RecipeFile = Callable[..., Path]

STEPS = 6
"""Two epochs of five rows, two in each step but the last."""
TRAIN = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "report_to": [],
}
EACH = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}


class Sender(View):
    """Sends signals to this process at a step, at an evaluation, or when a note is told."""

    def __init__(self, at: int | str, *numbers: int, evaluation: bool = False) -> None:
        self.at, self.numbers, self.evaluation = at, numbers or (signal.SIGTERM,), evaluation

    def send(self) -> None:
        for number in self.numbers:
            os.kill(os.getpid(), number)

    def note(self, text: str) -> None:
        if isinstance(self.at, str) and self.at in text:
            self.send()

    def step(self, step: Step) -> None:
        if step.step == self.at and not self.evaluation:
            self.send()

    def evaluated(self, step: int, *figures: Any) -> None:
        if step == self.at and self.evaluation:
            self.send()


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Also where the tests were started in the background of a shell, which has them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def recipe(recipe_file: RecipeFile, tmp_path: Path) -> RecipeFile:
    rows = [chat(f"count {n}", " ".join(map(str, range(n)))) for n in (1, 9, 2, 12, 5)]
    data = {"train": str(write_jsonl(tmp_path / "uneven.jsonl", rows))}
    held = str(write_jsonl(tmp_path / "held.jsonl", rows[:2]))

    def write(folder: str = "part", **train: Any) -> Path:
        wanted = data | ({"eval": held} if "eval_strategy" in train else {})
        sections = {
            "adapter": {"lora_dropout": 0.2, "target_modules": ["q_proj"]},
            "data": wanted,
            "train": TRAIN | train,
        }
        return recipe_file(f"{folder}.yaml", **sections, output_dir=str(tmp_path / folder))

    return write


def interrupted(path: Path, view: View, **options: Any) -> Interrupted:
    with pytest.raises(Interrupted) as caught:
        train(load(path), view, **options)
    return caught.value


def status(path: Path) -> str:
    found: str = json.loads((path.with_suffix("") / "manifest.json").read_text())["status"]
    return found


def checkpoints(path: Path) -> set[int]:
    return {int(each.name[11:]) for each in (path.with_suffix("") / "checkpoints").glob("checkpoint-*")}


def assert_same(whole: Report, resumed: Report) -> None:
    assert resumed.loss == whole.loss
    assert resumed.eval == whole.eval
    one, other = adapter(Path(whole.run)), adapter(Path(resumed.run))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


CASES: dict[str, dict[str, Any]] = {
    "random": {"save_strategy": "no"},
    "sequential, workers": {
        "train_sampling_strategy": "sequential",
        "dataloader_num_workers": 1,
        "save_strategy": "steps",
        "save_steps": 4,
        "save_total_limit": 1,
    },
    "by length, epochs": {
        "train_sampling_strategy": "group_by_length",
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_stopped_at_its_steps_comes_to_the_same(case: str, recipe: RecipeFile) -> None:
    whole, path = run(recipe("whole", **CASES[case])), recipe(**CASES[case])
    # At the first and the last, within an epoch, at its end, within the next.
    steps = [1, 2, 3, 5, STEPS] if case == "random" else [2, 3, 5]
    for step in steps:
        stopped = interrupted(path, Sender(step), resume=step > steps[0])
        assert (stopped.exit_code, status(path)) == (75, "interrupted")
        assert f"interrupted by SIGTERM; the same command with --resume goes on from step {step}" in str(stopped)
        assert step in checkpoints(path)
    resumed = run(path, resume=True)
    assert resumed.resumed_from == steps
    assert_same(whole, resumed)


def test_an_evaluation_that_is_cut_off_is_made_by_who_goes_on(recipe_file: RecipeFile, tmp_path: Path) -> None:
    """The loss rises after a few steps, so that all hangs on it: the best checkpoint, and when to stop."""
    data = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "eval")}
    write_jsonl(tmp_path / "train.jsonl", [chat("say", "a" * 30)] * 4)
    write_jsonl(tmp_path / "eval.jsonl", [chat("say", "b" * 30)])
    settings = HARD | EACH | {"learning_rate": 1.0, "max_steps": 20, "per_device_train_batch_size": 2, "save_steps": 2}
    settings |= {"load_best_model_at_end": True, "early_stopping_patience": 2}
    whole, path = (
        recipe_file(f"{name}.yaml", data=data, train=settings, output_dir=str(tmp_path / name))
        for name in ("whole", "part")
    )
    unbroken = run(whole)

    assert 3 <= unbroken.steps < 20
    for step in range(1, unbroken.steps + 1):
        assert interrupted(path, Sender(step, evaluation=step % 2 == 0), resume=step > 1).exit_code == 75
    resumed = run(path, resume=True)
    assert resumed.steps == unbroken.steps
    assert_same(unbroken, resumed)


def test_what_is_left_after_the_last_step_is_made(recipe: RecipeFile) -> None:
    settings = {"eval_strategy": "no", "save_strategy": "no"}
    whole, path = run(recipe("whole", **settings)), recipe(**settings)
    assert interrupted(path, Sender("after training")).exit_code == 75
    assert checkpoints(path) == {STEPS}
    assert_same(whole, run(path, resume=True))
    assert status(path) == "complete"


def test_the_report_is_written_to_its_end(recipe: RecipeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a moment, and of what is behind it nothing could be resumed."""
    sender = Sender(0)

    def page(*_: Any) -> str:
        sender.send()
        return "page"

    monkeypatch.setattr("qft.commands.train.training_page", page)
    path = recipe(save_strategy="no")
    assert run(path).steps == STEPS
    assert status(path) == "complete"
    assert (path.with_suffix("") / "report.html").read_text() == "page"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_second_signal_ends_at_once(number: int, recipe: RecipeFile) -> None:
    path = recipe(save_strategy="steps", save_steps=2)
    stopped = interrupted(path, Sender(3, signal.SIGTERM, number))
    assert (stopped.exit_code, status(path)) == (128 + number, "interrupted")
    assert checkpoints(path) == {2}
    assert "--resume goes on from step 2" in str(stopped)


def test_without_save_on_signal_it_ends_at_once(recipe: RecipeFile) -> None:
    path = recipe(save_strategy="steps", save_steps=2, save_on_signal=False)
    assert interrupted(path, Sender(3)).exit_code == 75
    assert checkpoints(path) == {2}


@pytest.mark.parametrize("moment", ["Reading the data", "Loading"])
def test_before_the_first_step_there_is_nothing_to_save(moment: str, recipe: RecipeFile) -> None:
    path, begun = recipe(), moment == "Loading"
    stopped = interrupted(path, Sender(moment, signal.SIGHUP))
    assert stopped.exit_code == 129
    assert ("before anything was saved; start anew with --overwrite" in str(stopped)) is begun
    if begun:
        assert status(path) == "interrupted"
        interrupted(path, Sender(2), overwrite=True)
    else:
        interrupted(path, Sender(2))
    assert interrupted(path, Sender(moment, signal.SIGINT), resume=True).exit_code == 75


def test_handlers_are_those_of_before(recipe: RecipeFile) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    interrupted(recipe(), Sender(1))
    assert [signal.getsignal(number) for number in SIGNALS] == before
    path, ended = recipe("thread"), list[Report]()
    thread = threading.Thread(target=lambda: ended.append(run(path)))
    thread.start()
    thread.join()
    assert ended[0].steps == STEPS


@pytest.mark.usefixtures("bounded")
def test_a_terminated_process_leaves_what_goes_on(recipe: RecipeFile) -> None:
    """To the whole group, as a batch system sends it: the worker must not take the batches away."""
    settings = {"max_steps": 24, "dataloader_num_workers": 1}
    path = recipe(**settings)
    said, told = path.with_suffix(".out"), path.with_suffix(".err")
    with Path(os.devnull).open() as nothing, said.open("w") as out, told.open("w") as err:
        process = fork(command("train", path), stdin=nothing, stdout=out, stderr=err)
    while "step 1/24" not in said.read_text():
        assert process.is_alive()
        time.sleep(0.01)
    assert process.pid
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    errors = told.read_text()
    assert process.exitcode == 75, errors
    found = re.search(r"SIGTERM: the step under way is finished.*goes on from step (\d+)$", errors, re.DOTALL | re.M)
    assert found, errors
    assert int(found[1]) in checkpoints(path)
    assert status(path) == "interrupted"
    assert "Traceback" not in errors
    assert_same(run(recipe("whole", **settings)), run(path, resume=True))
