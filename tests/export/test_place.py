"""What an export may replace, two of them in one folder, and what a killed one leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qft.documents.export import export_in
from qft.errors import BusyError, RunError
from qft.export import export
from qft.progress import View
from qft.run.lock import locked
from tests.support.exports import options, refusal


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter that was exported into it; not to be written into."""
    out = tmp_path_factory.mktemp("made")
    export(run, options("adapter", out=out), View())
    return out


def marked(folder: Path, **changes: object) -> Any:
    mark = {"schema_version": 1, "kind": "export", "target": "adapter", "passed": True, "sha256": {}}
    (folder / "export.json").write_text(json.dumps(mark | changes))


FOREIGN: dict[str, Callable[[Path], object]] = {
    "a user's model": lambda folder: (folder / "model.safetensors").write_text("mine"),
    "an empty folder": lambda folder: None,
    "an export of another target": lambda folder: marked(folder, target="merged"),
    "another document": lambda folder: marked(folder, kind="package"),
    "a later format": lambda folder: marked(folder, schema_version=2),
    "a file beside it": lambda folder: marked(folder) or (folder / "notes.md").write_text("mine"),
    "a run": lambda folder: (folder / "manifest.json").write_text("{}"),
}


OTHERS = [
    (name, foreign) for name in ("adapter.failed", "adapter.hub") for foreign in ("a user's model", "a file beside it")
]


@pytest.mark.parametrize(("name", "foreign"), [*(("adapter", foreign) for foreign in FOREIGN), *OTHERS])
def test_what_is_no_export_of_that_target_is_left_alone(run: Path, tmp_path: Path, name: str, foreign: str) -> None:
    (tmp_path / name).mkdir()
    FOREIGN[foreign](tmp_path / name)
    before = tree(tmp_path)
    for overwrite in (True, False):
        error = refusal(run, "adapter", out=tmp_path, overwrite=overwrite)
        assert isinstance(error, RunError)
        assert str(error).startswith(f"{tmp_path / name}: ")
        assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_link_is_not_replaced(run: Path, tmp_path: Path, made: Path) -> None:
    (tmp_path / "adapter").symlink_to(made / "adapter")
    refusal(run, "adapter", out=tmp_path, overwrite=True)
    assert (tmp_path / "adapter").is_symlink()


def test_its_own_are_replaced(run: Path, tmp_path: Path, made: Path) -> None:
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    shutil.copytree(made / "adapter", tmp_path / "adapter.failed")
    export(run, options("adapter", out=tmp_path, overwrite=True), View())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    mark = export_in(tmp_path / "adapter")
    assert mark
    assert mark.passed


def test_what_an_export_reads_is_not_replaced_by_it(run: Path, tmp_path: Path) -> None:
    own = tmp_path / "run"
    shutil.copytree(run, own)
    before = tree(own)
    assert "is read for the export" in str(refusal(own, "adapter", out=own, overwrite=True))
    (tmp_path / "link").symlink_to(own)
    assert "is read for the export" in str(refusal(own, "adapter", out=tmp_path / "link", overwrite=True))
    moved = tmp_path / "out" / "merged" / "run"
    shutil.copytree(run, moved)
    marked(moved.parent, target="merged")
    assert "is read for the export" in str(refusal(moved, "merged", out=tmp_path / "out", overwrite=True))
    assert tree(own) == before == tree(moved)


def test_what_comes_into_its_place_meanwhile_is_left_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qft.export.card import model_card

    def meanwhile(*arguments: object) -> str:
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "mine").touch()
        return model_card(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("qft.export.artifacts.model_card", meanwhile)
    assert isinstance(refusal(run, "adapter", out=tmp_path, gate=False), RunError)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["adapter", "adapter/mine"]


def test_one_export_at_a_time_in_a_folder(run: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "out", "qft export"), pytest.raises(BusyError):
        export(run, options("adapter", out=tmp_path / "out"), View())
    assert not (tmp_path / "out").exists()
