"""A run that was killed anywhere, or whose newest checkpoint is damaged, is gone on with to the same end."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from qft.commands.train import train
from qft.documents.recorded import record_of_run
from qft.documents.training import Report, read_report
from qft.errors import RunError
from qft.progress import Step, View
from qft.recipe import load
from qft.run.checkpoint import HASHES, STATE, TRAINER_STATE, checkpoints_in, newest_whole
from qft.run.lock import LOCK
from tests.support.forked import ended
from tests.support.once import once
from tests.support.rows import chat, write_jsonl
from tests.support.runs import Leaves, adapter, run

RecipeFile = Callable[..., Path]
TRAIN = {"max_steps": 6, "learning_rate": 1e-2, "report_to": [], "save_strategy": "steps", "save_steps": 2}
TRAIN |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}


class Killed(BaseException):
    """The process ended here, and nothing of it ran any more."""


class Watch(View):
    def __init__(self, cut: int = 0) -> None:
        self.cut, self.told = cut, list[str]()

    def note(self, text: str) -> None:
        self.told.append(text)

    def step(self, step: Step) -> None:
        if step.step == self.cut:
            raise KeyboardInterrupt


@pytest.fixture
def recipe(recipe_file: RecipeFile, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> RecipeFile:
    def make(folder: Path) -> None:
        write_jsonl(folder / "rows.jsonl", [chat(f"say {i}", f"it is {i}") for i in range(16)])

    data = {"train": str(once(tmp_path_factory, "undamaged-rows", make) / "rows.jsonl")}  # at one path for all tests

    def write(folder: str = "part", **sections: Any) -> Path:
        wanted: dict[str, Any] = {"output_dir": str(tmp_path / folder)} | sections
        wanted |= {"train": TRAIN | sections.get("train", {}), "data": data | sections.get("data", {})}
        return recipe_file(f"{folder}.yaml", **wanted)

    return write


@pytest.fixture
def whole(recipe: RecipeFile, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What comes of the recipe where nothing befalls it; beside it what a kill in its sixth step would have left."""

    def make(folder: Path) -> None:
        train(load(recipe("whole", output_dir=str(folder / "run"))), Leaves(folder / "run", {6: "killed"}))

    return read_report(once(tmp_path_factory, "undamaged", make) / "run")


@pytest.fixture
def cut(recipe: RecipeFile, whole: Report, tmp_path: Path) -> Path:
    """The recipe of a run that fell in its sixth step, behind checkpoints 2 and 4."""
    shutil.copytree(Path(whole.run).with_name("killed"), tmp_path / "part")
    return recipe()


def checkpoints(recipe: Path) -> Path:
    return recipe.with_suffix("") / "checkpoints"


def assert_same(whole: Report, other: Report) -> None:
    assert (other.loss, other.eval) == (whole.loss, whole.eval)
    one, two = adapter(Path(whole.run)), adapter(Path(other.run))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": truncate,
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
}
FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", TRAINER_STATE, STATE, "adapter_config.json"]
FILES += ["adapter_model.safetensors"]


def test_each_damage_of_each_file_is_told_and_the_one_before_is_taken(cut: Path) -> None:
    folder = checkpoints(cut)
    newest = folder / "checkpoint-4"
    kept = {name: (newest / name).read_bytes() for name in FILES}
    assert newest_whole(folder) == (newest, [])
    for name, content in kept.items():
        for damage in DAMAGES.values():
            damage(newest / name)
            found, told = newest_whole(folder)
            assert found == folder / "checkpoint-2"
            assert len(told) == 1
            assert told[0].startswith(f"{newest} is damaged, and not taken: {name} is ")
            (newest / name).write_bytes(content)
    truncate(newest / HASHES)
    assert newest_whole(folder)[1] == [f"{newest} is damaged, and not taken: {HASHES} cannot be read"]


def test_without_hashes_it_is_taken_if_its_files_can_be_read(cut: Path) -> None:
    folder = checkpoints(cut)
    newest = folder / "checkpoint-4"
    (newest / HASHES).unlink()
    assert newest_whole(folder) == (
        newest,
        [f"{newest} has no hashes of its files, which can be read: it is taken as it is"],
    )
    for name in FILES[:4] + FILES[-1:]:
        content = (newest / name).read_bytes()
        for damage in [truncate, *[DAMAGES[kind] for kind in ("empty", "missing") if name != TRAINER_STATE]]:
            damage(newest / name)
            found, told = newest_whole(folder)
            assert found == folder / "checkpoint-2"
            assert "checkpoint-4 is damaged" in told[0]
            (newest / name).write_bytes(content)
    flip(newest / "optimizer.pt")
    assert newest_whole(folder)[0] == folder / "checkpoint-2"


def test_a_resumed_run_says_which_it_takes_and_why(cut: Path, whole: Report) -> None:
    folder, view = checkpoints(cut), Watch()
    flip(folder / "checkpoint-4" / "adapter_model.safetensors")
    (folder / "checkpoint-9").mkdir()  # in which a kill left nothing
    (folder / "checkpoint-x").mkdir()
    resumed = train(load(cut), view, resume=True)
    assert resumed.resumed_from == [2]
    damaged = "checkpoint-4 is damaged, and not taken: adapter_model.safetensors is not what was written"
    assert [text for text in view.told if text.endswith(damaged)]
    assert f"Going on from {folder / 'checkpoint-2'}" in view.told
    assert_same(whole, resumed)
    assert newest_whole(folder) == (folder / "checkpoint-6", [])


def test_notes_beside_a_result_stay_and_are_nobodys(recipe: RecipeFile) -> None:
    path = recipe(train={"max_steps": 2})
    train(load(path), View())
    run_folder = checkpoints(path).parent
    notes = [run_folder / "adapter" / name for name in ("notes.md", "plots/loss.svg")]
    notes[1].parent.mkdir()
    for note in notes:
        note.write_text("mine")
    assert train(load(path, ["train.max_steps=4"]), View(), resume=True).steps == 4
    assert [note.read_text() for note in notes] == ["mine", "mine"]
    notes[0].write_text("mine, later")
    record = record_of_run(run_folder)
    assert record is not None
    record.require_whole()


def test_where_none_is_whole_each_is_told(cut: Path) -> None:
    for step in (2, 4):
        truncate(checkpoints(cut) / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(RunError, match=r"no checkpoint is whole: .*-4 is damaged.*optimizer.pt .*-2 is damaged.*anew"):
        run(cut, resume=True)


def test_what_is_kept_can_be_gone_on_from(recipe: RecipeFile) -> None:
    """A damaged checkpoint that is later by its number than the one to go on from does not count as kept."""
    path = recipe(train={"save_total_limit": 1, "save_steps": 1})
    with pytest.raises(KeyboardInterrupt):
        train(load(path), Watch(3))
    folder = checkpoints(path)
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-9" / TRAINER_STATE).write_text("{}")
    with pytest.raises(KeyboardInterrupt):
        train(load(path), Watch(4), resume=True)
    assert newest_whole(folder) == (folder / "checkpoint-3", [])
    assert {each.name for each in folder.glob("checkpoint-*")} == {"checkpoint-3"}


def test_a_damaged_best_one_is_refused(recipe: RecipeFile, tmp_path: Path) -> None:
    files = {"train": [chat("say", "a" * 30)] * 16, "eval": [chat("say", "b" * 30)] * 2}
    data = {"data": {name: str(write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in files.items()}}
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.5}
    path = recipe(train=best | {"save_total_limit": None}, **data)
    with pytest.raises(KeyboardInterrupt):
        train(load(path), Watch(6))
    folder = checkpoints(path)
    state = json.loads((folder / "checkpoint-4" / TRAINER_STATE).read_text())
    name = Path(state["best_model_checkpoint"]).name
    assert name == "checkpoint-2"
    flip(folder / name / "adapter_model.safetensors")
    refused = r"part.yaml:\d+: train.load_best_model_at_end: .*checkpoint-2, the best .*: adapter_model.safetensors is "
    with pytest.raises(RunError, match=refused + "not what was written; restore it, or set this to false"):
        run(path, resume=True)
    last = train(load(recipe(train=best | {"load_best_model_at_end": False}, **data)), View(), resume=True)
    assert last.steps == 6

    class Flips(View):
        def step(self, step: Step) -> None:
            if step.step == 6:
                flip(folder / "checkpoint-2" / "adapter_model.safetensors")

    with pytest.raises(RunError, match=r"train.load_best_model_at_end: .*checkpoint-2, the best checkpoint so far"):
        train(load(recipe(train=best, **data)), Flips(), overwrite=True)


class Killer(View):
    """Ends the process, as it were, before its `count`th change of a file below `folder` behind the last step."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count, self.over = str(folder), count, False

    def begin(self, steps: int, done: int) -> None:
        self.over = done == steps

    def step(self, step: Step) -> None:
        self.over = step.step == TRAIN["max_steps"]

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        written = event in ("os.rename", "os.remove", "os.mkdir", "shutil.rmtree") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        path = str(arguments[0]) if arguments else ""
        # The lock aside: no kill leaves it held, and this one would.
        if self.over and written and path.startswith(self.folder) and not path.endswith(LOCK):
            self.count -= 1
            if self.count <= 0:
                raise Killed


KILLERS: list[Killer] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    for killer in KILLERS:
        killer.hear(event, arguments)


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Callable[..., bool]]:
    """Trains, and tells whether it was killed. Such a hook stays for good, and mostly finds nobody to tell."""
    sys.addaudithook(_audit)

    def train_until(count: int, path: Path, **options: Any) -> bool:
        KILLERS[:] = [Killer(tmp_path / "part", count)]
        try:
            train(load(path), KILLERS[0], **options)
        except Killed:
            return True
        finally:
            KILLERS.clear()
        return False

    yield train_until
    KILLERS.clear()


def test_a_kill_anywhere_behind_the_last_step_is_finished(
    killed: Callable[..., bool], recipe: RecipeFile, tmp_path: Path
) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", [chat("say", "it"), chat("say so", "it is")])
    data: dict[str, Any] = {"data": {"eval": str(held)}}
    data["eval"] = {"metrics": ["exact_match"], "max_new_tokens": 2}
    whole, path = run(recipe("whole", **data)), recipe(**data)
    last = checkpoints(path) / "checkpoint-6"
    kills, count = [0, 0], 1
    while killed(count, path, resume=count > 1 or kills[1] > 0):
        finished = newest_whole(last.parent)[0] == last
        kills[finished] += 1
        # In the checkpoint each eighth change, and behind it each fourth from the first.
        count = (1 if kills[1] == 1 else count + 4) if finished else count + 8
    assert kills[0] > 2
    assert kills[1] > 5
    assert json.loads((tmp_path / "part" / "manifest.json").read_text())["status"] == "complete"
    report = read_report(tmp_path / "part")
    assert_same(whole, report)
    assert {path.name for path in (tmp_path / "part").iterdir()} >= {"report.html", "eval-after.json", "adapter"}


@pytest.mark.parametrize("name", ["adapter", "report.json", "report.html"])
def test_a_complete_run_that_lacks_something_is_finished(
    name: str, recipe: RecipeFile, whole: Report, tmp_path: Path
) -> None:
    shutil.copytree(whole.run, tmp_path / "part")
    path = recipe()
    with pytest.raises(RunError, match="made its 6 steps; there is nothing to resume"):
        run(path, resume=True)
    part = tmp_path / "part" / name
    shutil.rmtree(part) if part.is_dir() else part.unlink()
    assert_same(whole, run(path, resume=True))
    if name == "adapter":
        flip(part / "adapter_model.safetensors")
        assert_same(whole, run(path, resume=True))


def test_without_checkpoints_it_says_what_to_do(recipe: RecipeFile, tmp_path: Path) -> None:
    path = recipe(train={"save_strategy": "no", "save_steps": ...})
    with pytest.raises(KeyboardInterrupt):
        train(load(path), Watch(5))
    with pytest.raises(
        RunError, match=r"before it had .*checkpoint.*save_strategy is no\); start anew with --overwrite"
    ):
        run(path, resume=True)
    run(path, overwrite=True)
    with pytest.raises(RunError, match=r"adapter, to which it came, was written, .*`qft eval`.*--overwrite"):
        run(path, resume=True)


def test_checkpoints_that_may_not_be_read_are_not_taken_for_none() -> None:
    with TemporaryDirectory() as place:
        Path(place).chmod(0o755)  # to be entered by another user
        folder = Path(place, "checkpoints")
        (folder / "checkpoint-1").mkdir(parents=True)
        (folder / "checkpoint-1" / TRAINER_STATE).touch()
        folder.chmod(0)

        def look() -> None:
            if os.getuid() == 0:
                os.setuid(2**16 - 2)
            try:
                checkpoints_in(folder)
            except PermissionError:
                raise SystemExit(7) from None

        assert ended(look).returncode == 7
        folder.chmod(0o700)
