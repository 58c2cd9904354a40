"""What --overwrite may replace, and what becomes of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qft.commands.calibrate import calibrate
from qft.commands.train import train
from qft.errors import BusyError, NonFiniteError, RunError
from qft.progress import View
from qft.recipe import load
from qft.run.checkpoint import checkpoints_in, discard, seal
from qft.run.folder import Run
from qft.run.lock import locked
from qft.run.replaced import replacing
from tests.support.once import once
from tests.support.rows import chat, write_jsonl
from tests.support.runs import run

RecipeFile = Callable[..., Path]
EXTENSION = {"manifest_version": 3, "name": "mine", "version": "1.0"}
FOREIGN: dict[str, Any] = {
    "an object": {},
    "a browser extension": EXTENSION,
    "a package": {"kind": "run", "version": "1", "command": ["start"]},
    "a status alone": {"schema_version": 1, "kind": "run", "status": "complete"},
    "a version of a registry": {"schema_version": 1, "kind": "version", "created": "2026", "sha256": {}},
    "a later format": {
        "schema_version": 2, "kind": "run", "command": [], "status": "failed", "started": "2026", "versions": {"a": 1},
    },
}  # fmt: skip


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": True}, {}], ids=str)
def test_another_programs_folder_is_left_alone(
    name: str, options: dict[str, bool], recipe_file: RecipeFile, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "work").mkdir()
    (folder / "manifest.json").write_text(json.dumps(FOREIGN[name]))
    (folder / "background.js").write_text("mine")
    before = tree(folder)
    for command in (run, lambda path, **more: calibrate(load(path), View(), **more)):
        with pytest.raises(RunError):
            command(recipe_file(), **options)
    assert tree(folder) == before


def test_each_command_replaces_and_resumes_its_own_runs_alone(recipe_file: RecipeFile, tmp_path: Path) -> None:
    run(recipe_file())
    before = tree(tmp_path / "run")
    for options in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(RunError, match="holds a training, which `qft calibrate` does not touch"):
            calibrate(load(recipe_file()), View(), **options)
    edit_manifest(tmp_path / "run", lambda manifest: manifest.update(work="calibration"))
    with pytest.raises(RunError, match="holds a calibration, which `qft train` does not touch"):
        run(recipe_file(), overwrite=True)
    edit_manifest(tmp_path / "run", lambda manifest: manifest.update(work="training"))
    assert tree(tmp_path / "run").keys() == before.keys()


def test_an_older_run_is_known_by_its_plan(recipe_file: RecipeFile, tmp_path: Path) -> None:
    def older(manifest: dict[str, Any]) -> None:
        for name in ("schema_version", "kind", "work"):
            del manifest[name]

    run(recipe_file())
    edit_manifest(tmp_path / "run", older)
    run(recipe_file(train={"max_steps": 3}), resume=True)
    edit_manifest(tmp_path / "run", older)
    run(recipe_file(), overwrite=True)
    assert Run(tmp_path / "run").kind_of_work() == "training"
    edit_manifest(tmp_path / "run", older)
    (tmp_path / "run" / "plan.json").write_text("{}")
    with pytest.raises(RunError, match="does not say of what"):
        run(recipe_file(), overwrite=True)


def copy_of(base: Path, to: Path) -> dict[str, Any]:
    to.mkdir()
    for path in base.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return {"model": {"path": str(to)}}


def inside(folder: Path, what: str, tiny: Path) -> dict[str, Any]:
    """Sections of a recipe that reads something in a run's folder."""
    rows, link = folder / "mine.jsonl", folder.parent / "link.jsonl"
    write_jsonl(rows, [chat("say 1", "it is 1")] * 8)
    (folder / "mine.py").write_text("")
    if what == "files of the base":
        base = copy_of(tiny, folder.parent / "base")
        (folder.parent / "base" / "config.json").rename(folder / "config.json")
        (folder.parent / "base" / "config.json").symlink_to(folder / "config.json")
        return base
    if what == "rows by a link":
        link.symlink_to(rows)
    found: dict[str, dict[str, Any]] = {
        "base": {"model": {"path": str(folder / "adapter")}},
        "rows": {"data": {"train": f"{folder.parent}/base/../{folder.name}/{rows.name}"}},
        "held-out rows": {"data": {"eval": [{"path": str(rows)}]}},
        "rows by a link": {"data": {"train": str(link)}},
        "template": {"data": {"chat_template": str(rows)}},
        "plugin": {"quant": {"preset": ..., "mode": "custom", "plugin": str(folder / "mine.py")}},
        "a task": {"eval": {"harness": [str(folder / "task.yaml")]}},
    }
    (folder / "task.yaml").write_text("task: mine")
    return found[what]


@pytest.mark.parametrize(
    ("what", "field"),
    [
        ("base", "model.path"), ("files of the base", "model.path"), ("rows", "data.train.0.path"),
        ("rows by a link", "data.train.0.path"), ("held-out rows", "data.eval.0.path"),
        ("template", "data.chat_template"), ("plugin", "quant.plugin"), ("a task", "eval.harness.0"),
    ],
)  # fmt: skip
def test_what_a_run_reads_is_not_replaced_by_it(
    what: str, field: str, recipe_file: RecipeFile, tmp_path: Path, tiny_model: Path, finished: Path
) -> None:
    recipe = recipe_file(**inside(finished, what, tiny_model))
    before = tree(finished)
    for command in (run, lambda path, **more: calibrate(load(path), View(), **more)):
        if command is not run:
            edit_manifest(finished, lambda manifest: manifest.update(work="calibration"))
            before = tree(finished)
        with pytest.raises(RunError) as caught:
            command(recipe, overwrite=True)
        assert str(caught.value).startswith(f"{recipe}:")
        assert f"{field}: " in str(caught.value)
        assert tree(finished) == before


def test_the_recipe_itself_is_not_replaced(finished: Path) -> None:
    before = tree(finished)
    with pytest.raises(RunError, match=r"recipe\.yaml is read for the new run"):
        train(load(finished / "recipe.yaml", [f"output_dir={finished}"]), View(), overwrite=True)
    assert tree(finished) == before


@pytest.fixture
def finished(recipe_file: RecipeFile, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        run(recipe_file("before.yaml", output_dir=str(folder / "run")))

    return Path(shutil.copytree(once(tmp_path_factory, "claimed", make) / "run", tmp_path / "run"))


class Notes(View):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_an_earlier_run_waits_until_the_new_one_is_complete(
    finished: Path, recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, view = tree(finished), Notes()

    def fall(*_: Any, **__: Any) -> None:
        raise NonFiniteError("it fell")

    with monkeypatch.context() as patch:
        patch.setattr("qft.commands.train.train_model", fall)
        for number in (1, 2):
            with pytest.raises(NonFiniteError):
                train(load(recipe_file()), view, overwrite=True)
            kept = finished / f"replaced-{number}"
            assert view.notes[-1] == f"The earlier run is kept in {kept} until this one is complete"
    assert tree(finished / "replaced-1") == before
    assert Run(finished / "replaced-1").kind_of_work() == "training"
    run(recipe_file(), overwrite=True)
    assert tree(finished).keys() == before.keys()


def test_what_qft_did_not_write_into_a_run_is_not_deleted_with_it(finished: Path, recipe_file: RecipeFile) -> None:
    checkpoint = max(path.name for path in (finished / "checkpoints").glob("checkpoint-*"))
    names = (
        "notes.md", "export/mine/weights", "adapter/notes.md", "checkpoints/notes.md", "checkpoints/best/adapter.json",
        f"checkpoints/{checkpoint}/notes.md", f"checkpoints/{checkpoint}/mine/plot.json", "export/adapter/notes.md",
        "events/notes.md", "answers/notes.md", "eval/notes.md", "eval/answers/plot.json", "work/notes.md",
    )  # fmt: skip
    mine = [finished / name for name in names]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    ours = [finished / "eval" / name for name in ("eval.json", "report.html", "answers/base.jsonl")]
    ours += [finished / "work" / name for name in ("done-00000.json", "block-00000-0.safetensors")]
    for path in ours:
        path.write_text("qft's")
    made = finished / "export" / "adapter" / "export.json"
    mark = {"schema_version": 1, "kind": "export", "target": "adapter", "passed": True, "sha256": {}}
    made.write_text(json.dumps(mark))
    view = Notes()
    train(load(recipe_file()), view, overwrite=True)
    assert not any(path.exists() for path in [*mine, *ours, made])
    assert tree(finished / "replaced-1") == dict.fromkeys(names, b"mine")
    assert str(finished / "replaced-1" / "notes.md") in view.notes[-1]


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_kill_while_it_is_moved_aside_costs_nothing(
    options: dict[str, bool], finished: Path, recipe_file: RecipeFile
) -> None:
    before, rows = tree(finished), load(finished / "recipe.yaml").recipe.data.train[0].path
    aside = finished / "replaced-1"
    aside.mkdir()
    for name in ("manifest.json", "recipe.yaml", "checkpoints", "adapter"):
        os.replace(finished / name, aside / name)
    if options.get("overwrite"):
        run(recipe_file(), overwrite=True)
        assert tree(finished).keys() == before.keys()
        return
    with pytest.raises(RunError, match="nothing to resume" if options else "use --resume"):  # it is complete
        run(recipe_file(data={"train": rows}), **options)
    if options:
        assert tree(finished) == before
    else:
        assert (aside / "manifest.json").exists()


def test_a_folder_that_a_kill_left_empty_is_removed(finished: Path, recipe_file: RecipeFile) -> None:
    for number in (1, 3):
        (finished / f"replaced-{number}").mkdir()
    run(recipe_file(), overwrite=True)
    assert [*finished.glob("replaced-*")] == []


def test_a_run_that_cannot_begin_leaves_the_earlier_one_in_its_place(finished: Path) -> None:
    before = tree(finished)
    with pytest.raises(OSError, match="fell"), replacing(finished):  # noqa: PT012
        (finished / "manifest.json").write_text("new")
        raise OSError("fell")
    assert tree(finished) == before


def test_a_living_command_in_the_run_keeps_it(finished: Path, recipe_file: RecipeFile) -> None:
    before = tree(finished)
    with locked(finished, "qft train"):
        for options in ({"overwrite": True}, {"resume": True}, {}):
            with pytest.raises(BusyError):
                run(recipe_file(), **options)
    (finished / "export").mkdir()
    with locked(finished / "export", "qft export"), pytest.raises(BusyError, match="qft export"):
        run(recipe_file(), overwrite=True)
    assert tree(finished) == before


@pytest.mark.parametrize("sealed", [True, False])
def test_what_lies_beside_a_checkpoint_outlives_it(sealed: bool, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    (checkpoint / "parts").mkdir(parents=True)
    for name in ("optimizer.pt", "parts/a.distcp", "adapter_model.safetensors", "trainer_state.json"):
        (checkpoint / name).write_text("{}")
    if sealed:
        seal(checkpoint)
    (checkpoint / "mine").mkdir()
    (checkpoint / "mine" / "plot.png").write_text("mine")
    (checkpoint / "best").symlink_to(tmp_path)
    discard(checkpoint)
    assert sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*")) == [
        "best", "mine", "mine/plot.png",
    ]  # fmt: skip
    assert not checkpoints_in(tmp_path)
