"""What others do to a run's folder, its rows and its processes while it is at work."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch._utils import ExceptionWrapper

from qft.cli.failures import explained
from qft.commands.evaluate import EvalOptions, evaluate
from qft.commands.train import train
from qft.commands.verify import verify
from qft.errors import BusyError, DamagedError, DataError, MissingError, OutOfMemoryError, RunError
from qft.export import ExportOptions, export
from qft.progress import Step, View
from qft.recipe import load
from qft.run.lock import LOCK, locked
from qft.training.workers import workers_heard
from tests.support.forked import ended, fork
from tests.support.once import once
from tests.support.rows import chat, write_jsonl
from tests.support.runs import run

RecipeFile = Callable[..., Path]
FEW: dict[str, Any] = {"max_steps": 3, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def finished(recipe_file: RecipeFile, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run, at the place of those to come."""

    def make(folder: Path) -> None:
        run(recipe_file("first.yaml", train=FEW, output_dir=str(folder / "run")))

    return Path(shutil.copytree(once(tmp_path_factory, "meanwhile", make) / "run", tmp_path / "run"))


class Meanwhile(View):
    """Does something behind the first step, and keeps what it is told."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act, self.notes = act, list[str]()

    def step(self, step: Step) -> None:
        if step.step == 1:
            self.act()

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("lost", ["the folder", "what the manifest says"])
def test_what_is_removed_of_a_run_at_work_is_written_again(lost: str, recipe_file: RecipeFile, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def act() -> None:
        if lost == "the folder":
            folder.rename(tmp_path / "moved")
        else:
            (folder / "manifest.json").write_text("")

    view = Meanwhile(act)
    train(load(recipe_file(train=FEW)), view)
    evaluate([str(folder)], EvalOptions(data=str(tmp_path / "chats.jsonl")), View())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["status"], manifest["work"]) == ("complete", "training")
    assert {"recipe.yaml", "plan.json"} <= manifest["files"].keys()
    [again] = [note for note in view.notes if note.endswith("while the run was at work: written again")]
    names = "manifest.json, recipe.yaml, plan.json" if lost == "the folder" else "manifest.json"
    assert f"somebody removed {names} while" in again


def test_events_that_cannot_be_written_end_no_training(
    recipe_file: RecipeFile, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    events = tmp_path / "run" / "events"
    recipe = recipe_file(train=FEW | {"max_steps": 6, "save_steps": 6, "report_to": ["tensorboard"]})
    view = Meanwhile(lambda: shutil.rmtree(events))
    assert train(load(recipe), view).loss.history[-1][0] == 6
    [told] = [note for note in view.notes if "TensorBoard" in note]
    assert told.endswith("No such file or directory. TensorBoard's events end here, and the training goes on")
    assert "Traceback" not in capfd.readouterr().err


def test_a_folder_that_another_command_has_by_now_is_left_to_it(recipe_file: RecipeFile, tmp_path: Path) -> None:
    folder, ready = tmp_path / "run", tmp_path / "ready"
    began = list[Any]()

    def hold() -> None:
        with locked(folder, "qft train"):
            (folder / "its").write_text("own")
            ready.touch()
            time.sleep(60)

    def act() -> None:
        folder.rename(tmp_path / "moved")
        with Path(os.devnull).open() as nothing:
            began.append(fork(hold, stdin=nothing, stdout=2, stderr=2))
        while not ready.exists():
            time.sleep(0.001)

    with pytest.raises(BusyError, match="the folder that this command held was moved away or removed"):
        train(load(recipe_file(train=FEW)), Meanwhile(act))
    assert {path.name for path in folder.iterdir()} <= {LOCK, "its"}
    [process] = began
    process.kill()
    process.join()


def test_streamed_rows_that_change_meanwhile_are_told(recipe_file: RecipeFile, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [chat(f"say {i}", f"it is {i}") for i in range(16)])
    as_it_was = path.read_text()
    settings = FEW | {"max_steps": 20, "dataloader_num_workers": 1, "save_steps": 4}
    recipe = recipe_file(data={"train": str(path), "streaming": True}, train=settings)
    with pytest.raises(DataError) as caught:
        train(load(recipe), Meanwhile(lambda: path.write_text(as_it_was.replace("it is", "no it"))))
    assert str(caught.value).startswith(f"{path}:1: the file has changed since it was first read; put back what was")
    assert "Traceback" not in (tmp_path / "run" / "manifest.json").read_text()
    path.write_text(as_it_was)
    assert run(recipe, resume=True).resumed_from


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "it's/rows.jsonl"), MissingError),
        (DataError("rows.jsonl:1: two\nlines: of it"), DataError),
    ],
)
def test_what_a_worker_fails_at_is_told_as_by_the_run_itself(error: Exception, kind: type[Exception]) -> None:
    try:
        raise error
    except Exception:
        caught = ExceptionWrapper(where="in DataLoader worker process 0")  # type: ignore[no-untyped-call]
    with pytest.raises(type(error)) as raised, workers_heard():
        caught.reraise()  # type: ignore[no-untyped-call]
    assert str(raised.value) == str(error)
    assert type(explained(raised.value)) is kind


def test_a_killed_worker_is_told_as_a_lack_of_memory(recipe_file: RecipeFile) -> None:
    def kill() -> None:
        [worker] = (each for each in psutil.Process().children() if each.name() == "pt_data_worker")
        worker.kill()

    recipe = recipe_file(train=FEW | {"max_steps": 40, "dataloader_num_workers": 1, "save_steps": 40})

    def work() -> None:  # in a process of its own: torch tells of the worker wherever another child ends later
        try:
            train(load(recipe), Meanwhile(kill))
        except (OutOfMemoryError, RuntimeError) as error:  # torch's own where its signal comes last
            told = explained(error)
            os._exit(told.exit_code if told else 1)

    assert ended(work).returncode == 9


def test_whoever_reads_a_run_at_work_is_told_whose_it_is(recipe_file: RecipeFile, tmp_path: Path) -> None:
    refusals = list[str]()

    def act() -> None:
        for read in (
            lambda: export(tmp_path / "run", ExportOptions(to=("merged",)), View()),
            lambda: evaluate([str(tmp_path / "run")], EvalOptions(), View()),
        ):
            with pytest.raises(BusyError) as caught:
                read()
            refusals.append(str(caught.value))

    train(load(recipe_file(train=FEW)), Meanwhile(act))
    assert len(refusals) == 2
    assert all("`qft train` (process " in text for text in refusals)


def test_an_export_of_a_run_that_is_removed_meanwhile(finished: Path, tmp_path: Path) -> None:
    class Removes(View):
        def note(self, text: str) -> None:
            if text.startswith("Loading merged"):
                shutil.rmtree(finished)

    with pytest.raises(BusyError, match="changed or replaced the run while it was read"):
        export(finished, ExportOptions(to=("merged",), out=tmp_path / "out"), Removes())
    assert not any((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(("text", "what"), [("", "is damaged"), ("[]", "is damaged"), (None, "is missing")])
def test_a_run_without_its_manifest_is_known_by_its_plan(
    text: str | None, what: str, finished: Path, recipe_file: RecipeFile
) -> None:
    path, recipe = finished / "manifest.json", recipe_file()
    path.unlink()
    if text is not None:
        path.write_text(text)
    for read in (
        lambda: run(recipe, resume=True),
        lambda: run(recipe, overwrite=True),
        lambda: export(finished, ExportOptions(to=("merged",)), View()),
        lambda: evaluate([str(finished)], EvalOptions(), View()),
        lambda: verify(finished),
    ):
        with pytest.raises(DamagedError, match=f"manifest.json: {what}, without which nobody can tell"):
            read()


def test_a_complete_run_without_its_checkpoints_was_not_cut_off(finished: Path, recipe_file: RecipeFile) -> None:
    shutil.rmtree(finished / "checkpoints")
    with pytest.raises(RunError) as caught:
        run(recipe_file(train=FEW | {"max_steps": 9}), resume=True)
    assert "the run is complete, and holds no checkpoint from which it could go on" in str(caught.value)
