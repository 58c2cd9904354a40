"""Disks that are full, read-only or refuse a name: nothing complete is touched, and the status says why."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from qft.disk import disk_failure, room
from qft.errors import ModelError, RunError
from qft.plan import make_plan
from qft.recipe import load
from qft.run.folder import Run
from tests.support.disks import fill
from tests.support.models import write_remote_code_model
from tests.support.runs import run

RecipeFile = Callable[..., Path]
Work = Callable[..., Any]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def before_work(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Let something happen once a run has begun, before it trains."""
    from qft.training.session import train_model

    def train(*arguments: Any, **more: Any) -> Path:
        happens()
        return train_model(*arguments, **more)

    monkeypatch.setattr("qft.commands.train.train_model", train)


def test_a_full_disk_is_told_and_keeps_the_earlier_run(
    disk: Path, recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_file(output_dir=str(disk / "run"), train={"report_to": []})
    run(recipe)
    before = tree(disk / "run")
    before_work(monkeypatch, lambda: fill(disk))
    with pytest.raises(RunError, match="the disk is full; free some space") as caught:
        run(recipe, overwrite=True)
    assert caught.value.exit_code == 7
    manifest = Run(disk / "run").manifest()
    assert manifest
    assert manifest.status == "failed"
    assert "the disk is full" in (manifest.error or "")
    assert tree(disk / "run" / "replaced-1") == before
    assert {path.name for path in (disk / "run").glob(".*")} == set()


def test_a_disk_that_is_full_from_the_start_is_told_before_any_work(disk: Path, recipe_file: RecipeFile) -> None:
    recipe = recipe_file(output_dir=str(disk / "run"), train={"report_to": []})
    run(recipe)
    fill(disk)
    before = tree(disk)
    with pytest.raises(RunError, match=r"the disk is full|needs .* and the disk has"):
        run(recipe, overwrite=True)
    assert tree(disk) == before


def test_a_read_only_disk_is_told_before_any_work(disk: Path, recipe_file: RecipeFile) -> None:
    run(recipe_file(output_dir=str(disk / "run")))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    before = tree(disk)
    for name, options in [("run", {"overwrite": True}), ("new", {})]:
        with pytest.raises(RunError, match="the file system is read-only"):
            run(recipe_file(output_dir=str(disk / name)), **options)
    assert tree(disk) == before


def test_a_disk_that_takes_nothing_more_does_not_hide_why(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def become_read_only() -> None:
        monkeypatch.setattr("qft.run.folder.write_json", refuse)
        refuse()

    before_work(monkeypatch, become_read_only)
    with pytest.raises(RunError, match="the file system is read-only"):
        run(recipe_file())


@pytest.mark.parametrize("size", [20_000, 60_000])
def test_a_limit_of_file_sizes_is_told(
    size: int, recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    recipe = recipe_file(train={"report_to": []})
    before_work(monkeypatch, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1])))
    try:
        with pytest.raises(RunError, match="larger than the system or `ulimit -f` allows"):
            run(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    manifest = Run(tmp_path / "run").manifest()
    assert manifest
    assert manifest.status == "failed"
    assert "ulimit" in (manifest.error or "")


def test_a_name_that_is_too_long_is_told_before_any_work(recipe_file: RecipeFile, tmp_path: Path) -> None:
    for name in ("n" * 256, "/".join(["n" * 200] * 30)):
        with pytest.raises(RunError, match="the name is too long"):
            run(recipe_file(output_dir=str(tmp_path / name)))
    run(recipe_file(output_dir=str(tmp_path / ("n" * 255)), train={"report_to": []}))


@pytest.mark.parametrize("name", ["file/run", "dangling", "round", "file"])
def test_a_place_that_is_no_folder_is_told(name: str, recipe_file: RecipeFile, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "none")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    before = {path.name for path in tmp_path.iterdir()}
    recipe = recipe_file(output_dir=str(tmp_path / name))
    with pytest.raises(RunError):
        run(recipe)
    assert {path.name for path in tmp_path.iterdir()} == {*before, "recipe.yaml"}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "quota"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (Exception("No space left on device (os error 28)"), "the disk is full"),  # as of tokenizers
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0: file write failed"), "written"),
        (ValueError("another"), None),
        (FileNotFoundError(errno.ENOENT, "No such file", "rows.jsonl"), None),
        (ModelError("No space left on device"), None),  # qft has said it already
    ],
    ids=str,
)
def test_what_libraries_make_of_a_full_disk_is_known(error: Exception, told: str | None, tmp_path: Path) -> None:
    try:
        raise RuntimeError("wrapped") from error
    except RuntimeError as wrapped:
        found = disk_failure(wrapped, tmp_path)
    assert (told in str(found)) if told else found is None


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full"),
        (
            OSError(errno.EIO, os.strerror(errno.EIO), "/cache/offload.dat"),
            "/cache/offload.dat: the disk fails to read",
        ),
        (OSError("Can't load the model"), "the quota of the disk is used up"),  # as transformers says it
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
    ],
    ids=str,
)
@pytest.mark.parametrize("door", ["AutoModelForCausalLM", "AutoTokenizer", "AutoConfig"])
def test_a_disk_that_fails_while_a_model_is_read_is_not_the_models_fault(
    door: str, error: Exception, told: str, recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error from (None if getattr(error, "errno", 1) else OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)))

    monkeypatch.setattr(f"transformers.{door}.from_pretrained", refuse)
    with pytest.raises(RunError, match=told) as caught:
        run(recipe_file())
    assert caught.value.exit_code == 7


def test_a_full_disk_for_the_code_that_comes_with_a_model_is_told(
    disk: Path, tmp_path: Path, recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_remote_code_model(tmp_path / "own")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(disk))
    fill(disk)
    with pytest.raises(RunError, match="the disk is full; free some space"):
        run(recipe_file(model={"path": str(tmp_path / "own"), "trust_remote_code": True}))


@pytest.mark.parametrize(
    ("train", "checkpoints"),
    [
        ({"save_strategy": "no"}, 1),  # that a signal asks for
        ({"save_strategy": "no", "save_on_signal": False}, 0),
        ({"save_strategy": "steps", "save_steps": 2, "save_total_limit": None}, 6),
        ({"save_strategy": "steps", "save_steps": 2, "save_total_limit": None, "save_on_signal": False}, 5),
        ({"save_strategy": "steps", "save_steps": 3, "save_total_limit": None}, 5),
        ({"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}, 2),
        ({"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}, 3),
        ({"save_strategy": "steps", "save_steps": 100, "save_total_limit": 2}, 2),
        ({"save_strategy": "epoch", "save_total_limit": None}, 4),  # of four steps each
    ],
)
def test_the_checkpoints_that_are_kept_are_counted(
    train: dict[str, Any], checkpoints: int, recipe_file: RecipeFile
) -> None:
    plan = make_plan(load(recipe_file(train={"max_steps": 10} | train)))
    weights = plan.model.shape.trainable_parameters * 4
    assert plan.checkpoint_bytes == weights * (3 * checkpoints + 1)


def test_small_sizes_are_told() -> None:
    assert [room(count) for count in (0, 900, 2048, 3 * 2**20, 5 * 2**30)] == [
        "0 bytes", "900 bytes", "2.0 KiB", "3.0 MiB", "5.0 GiB",
    ]  # fmt: skip
