"""A run's files are what it wrote, or nothing is made of them: each command that reads one names what is damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import Result

from qft.errors import DamagedError
from qft.export import export
from qft.files import sha256
from qft.model.target import parse_target
from qft.plan import plan_model
from qft.progress import View
from qft.recipe import load
from tests.support.cli import qft
from tests.support.exports import options
from tests.support.once import once
from tests.support.runs import trained

WEIGHTS = "adapter/adapter_model.safetensors"


class Notes(View):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """Of the run, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run of full finetuning; not to be written into."""

    def make(folder: Path) -> None:
        trained(folder, tiny_model, quant=None, adapter={"kind": "none"}, train={"max_steps": 1})

    return once(tmp_path_factory, "trained-full", make) / "run"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_low(path: Path) -> None:
    """A bit that changes a number a little."""
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = (flip, truncate, Path.unlink, make_folder, dangle, make_pipe)


def manifest(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return values


def without_hashes(run: Path) -> None:
    """As an older qft left it."""
    older = {name: value for name, value in manifest(run).items() if name not in ("files", "accepted")}
    (run / "manifest.json").write_text(json.dumps(older))


def calibration(run: Path) -> Path:
    recipe = {
        "model": {"path": str(run), "device": "cpu"},
        "data": {"train": str(run / "rows.jsonl"), "max_length": 64},
        "calibrate": {"data_type": "int", "bits": 4},
        "output_dir": str(run.parent / "calibrated"),
    }
    path = run.parent / "calibrate.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


COMMANDS: dict[str, Callable[[Path], Result]] = {
    "export": lambda run: qft("export", run, "--to", "merged"),
    "eval": lambda run: qft("eval", run, "--out", run.parent / "evaluated"),
    "chat": lambda run: qft("chat", run, "--prompt", "hi"),
    "calibrate": lambda run: qft("calibrate", calibration(run)),
    "verify": lambda run: qft("report", "--verify", run),
}


def test_a_complete_run_knows_each_file_that_it_wrote(run: Path, full: Path) -> None:
    for folder, result in ((run, "adapter"), (full, "model")):
        files = manifest(folder)["files"]
        there = {path.relative_to(folder).as_posix() for path in (folder / result).rglob("*")}
        assert files.keys() == there | {"recipe.yaml", "plan.json", "rows.jsonl", "report.json"} | {
            "eval-before.json",
            "eval-after.json",
        }
        assert all(sha256(folder / name) == digest for name, digest in files.items())


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", [WEIGHTS, "adapter/adapter_config.json", "recipe.yaml", "rows.jsonl"])
def test_a_flipped_bit_is_refused_by_the_files_name(name: str, command: str, copy: Path) -> None:
    flip(copy / name)
    before = sorted(copy.rglob("*"))
    ran = COMMANDS[command](copy)
    assert (ran.exit_code, "Traceback" in ran.stderr) == (4, False), ran.stderr
    assert f"{copy / name}: is not what was written" in ran.stderr
    assert f"qft report --verify --accept {copy}" in ran.stderr
    assert sorted(copy.rglob("*")) == before
    assert not (copy.parent / "calibrated").exists()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [WEIGHTS, "adapter/adapter_config.json"])
def test_every_damage_of_an_adapter_is_seen(name: str, damage: Callable[[Path], None], copy: Path) -> None:
    damage(copy / name)
    for command in ("export", "eval", "verify"):
        ran = COMMANDS[command](copy)
        assert ran.exit_code == 4, ran.stderr
        assert str(copy / name) in ran.stderr


def test_an_adapter_that_is_gone_is_damage(copy: Path) -> None:
    shutil.rmtree(copy / "adapter")
    for run in COMMANDS.values():
        ran = run(copy)
        assert ran.exit_code == 4, ran.stderr
        assert f"{copy / WEIGHTS}: is missing" in ran.stderr


def test_what_a_loader_could_take_must_not_be_added(copy: Path) -> None:
    for harmless in ("notes.md", ".DS_Store", "training.log"):
        (copy / "adapter" / harmless).write_text("")
    assert qft("report", "--verify", copy).exit_code == 0
    (copy / "adapter" / "adapter_model.bin").write_bytes(b"")
    ran = COMMANDS["export"](copy)
    assert ran.exit_code == 4
    assert f"{copy / 'adapter/adapter_model.bin'}: was not written with the others" in ran.stderr


def test_the_base_alone_needs_no_adapter(copy: Path) -> None:
    flip(copy / WEIGHTS)
    assert parse_target(f"{copy}@base", adapter=None, data=None).adapter is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_no_base(damage: Callable[[Path], None], full: Path, tmp_path: Path) -> None:
    """Neither of what is made of the run, nor where its folder is named like any model's, nor through a link."""
    copy = Path(shutil.copytree(full, tmp_path / "copy"))
    damage(copy / "model" / "model.safetensors")
    for command in ("export", "eval", "calibrate"):
        ran = COMMANDS[command](copy)
        assert ran.exit_code == 4, ran.stderr
        assert f"{copy / 'model' / 'model.safetensors'}: is" in ran.stderr
    (tmp_path / "link").symlink_to(copy / "model")
    values = yaml.safe_load((full.parent / "recipe.yaml").read_text())
    for path in (copy / "model", tmp_path / "link"):
        recipe = tmp_path / "again.yaml"
        recipe.write_text(yaml.safe_dump(values | {"model": {"path": str(path), "device": "cpu"}}))
        with pytest.raises(DamagedError, match=r"model\.safetensors"):
            plan_model(load(recipe))


def test_what_is_meant_is_recorded_as_the_message_says(copy: Path, tmp_path: Path) -> None:
    flip(copy / WEIGHTS)
    assert COMMANDS["export"](copy).exit_code == 4
    ran = qft("report", "--verify", "--accept", copy, "--json")
    assert ran.exit_code == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert (document["whole"], document["problems"]) == (True, [])
    assert [entry["files"] for entry in document["accepted"]] == [[WEIGHTS]]
    export(copy, options("adapter", gate=False, out=tmp_path / "out"), View())
    flip(copy / WEIGHTS)
    assert COMMANDS["export"](copy).exit_code == 4
    assert manifest(copy)["accepted"] == document["accepted"]


def test_an_adapter_elsewhere_is_the_users_own(copy: Path, tmp_path: Path) -> None:
    flip(copy / WEIGHTS)
    own = Path(shutil.copytree(copy / "adapter", tmp_path / "mine" / "adapter"))
    assert parse_target(f"{copy / 'recipe.yaml'}", adapter=own, data=None).adapter == own
    with pytest.raises(DamagedError):
        parse_target(f"{copy / 'recipe.yaml'}", adapter=copy / "adapter", data=None)


def test_a_run_of_before_works_and_says_that_it_cannot_be_verified(copy: Path, tmp_path: Path) -> None:
    without_hashes(copy)
    view = Notes()
    [document] = export(copy, options("adapter", gate=False, out=tmp_path / "out"), view)
    assert any("cannot be verified" in text for text in view.told)
    assert document.target == "adapter"
    ran = qft("report", "--verify", copy, "--json")
    assert ran.exit_code == 3
    assert (json.loads(ran.stdout)["recorded"], json.loads(ran.stdout)["whole"]) == (False, None)
    assert "cannot be verified" in ran.stderr
    assert "--accept" in ran.stderr
    assert qft("report", "--verify", "--accept", copy).exit_code == 0
    assert qft("report", "--verify", copy).exit_code == 0


def test_a_run_that_is_not_complete_has_nothing_to_accept(copy: Path) -> None:
    (copy / "manifest.json").write_text(json.dumps(manifest(copy) | {"status": "interrupted", "files": None}))
    assert qft("report", "--verify", copy).exit_code == 3
    assert qft("report", "--verify", "--accept", copy).exit_code == 7
    assert qft("report", "--accept", copy).exit_code == 2
    assert qft("report", "--verify", "--svg", copy / "a.svg", copy).exit_code == 2


BASE_CHANGES: dict[str, Callable[[Path], object]] = {
    "tokenizer.json": lambda path: path.write_text(path.read_text() + " "),
    "config.json": lambda path: path.write_text(path.read_text() + " "),
    "generation_config.json": Path.unlink,
    "chat_template.jinja": lambda path: path.write_text(path.read_text() + "{# #}"),
    "vocab.txt": lambda path: path.write_text("a"),
    "model.safetensors": flip_low,
}


@pytest.fixture(scope="module")
def on_own_base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, and of the base that it alone has; a test that changes them sets them back."""
    folder = tmp_path_factory.mktemp("on-own-base")
    shutil.copytree(tiny_model, folder / "base")
    trained(folder, folder / "base", adapter={"r": 2, "target_modules": ["q_proj"]}, train={"max_steps": 1})
    return folder


@pytest.fixture
def changeable(on_own_base: Path, tmp_path: Path) -> Iterator[Path]:
    """That base."""
    base, kept = on_own_base / "base", shutil.copytree(on_own_base / "base", tmp_path / "kept")
    yield base
    shutil.rmtree(base)
    shutil.copytree(kept, base)


@pytest.mark.parametrize("name", BASE_CHANGES)
def test_a_base_that_changed_since_is_told_by_its_file(
    name: str, changeable: Path, on_own_base: Path, tmp_path: Path
) -> None:
    base, made = changeable, Path(shutil.copytree(on_own_base / "run", tmp_path / "run"))
    assert qft("report", "--verify", made).exit_code == 0
    BASE_CHANGES[name](base / name)
    ran = qft("report", "--verify", made)
    assert ran.exit_code == 4
    assert f"{base / name}: " in ran.stderr
    config = {"model": {"path": str(made), "device": "cpu"}, "calibrate": {"engine": "rtn", "bits": 8}}
    config |= {"data": {"train": str(on_own_base / "rows.jsonl")}, "output_dir": str(tmp_path / "calibrated")}
    (tmp_path / "calibrate.yaml").write_text(yaml.safe_dump(config))
    commands = [("eval", made), ("export", made, "--to", "merged", "--no-gate"), ("chat", made, "--prompt", "a")]
    for command in (*commands, ("calibrate", tmp_path / "calibrate.yaml")):
        ran = qft(*command)
        assert ran.exit_code == 6, ran.stderr
        assert f"was trained on another base than {base} ({name}: " in ran.stderr
        assert f"`qft report --verify --accept {made}`" in ran.stderr
    assert not (tmp_path / "calibrated").exists()
    assert qft("report", "--verify", "--accept", made).exit_code == 0
    assert qft("chat", made, "--prompt", "a", "--max-new-tokens", "1").exit_code == 0


def test_of_an_older_run_the_base_is_what_it_recorded(run: Path, copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    assert manifest["base"]["sha256"].pop("chat_template.jinja")
    manifest["base"]["whole"] = False
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert qft("report", "--verify", copy).exit_code == 0
    assert qft("chat", copy, "--prompt", "a", "--max-new-tokens", "1").exit_code == 0


def test_verify_names_each_file_and_those_of_exports(copy: Path) -> None:
    export(copy, options("adapter", gate=False), View())
    whole = json.loads(qft("report", "--verify", copy, "--json").stdout)
    verdicts = {each["file"]: each["verdict"] for each in whole["files"]}
    assert set(verdicts.values()) == {"whole"}
    assert {WEIGHTS, "report.json", "export/adapter/adapter_model.safetensors"} <= verdicts.keys()
    flip(copy / "export" / "adapter" / "adapter_model.safetensors")
    (copy / "report.json").unlink()
    ran = qft("report", "--verify", copy, "--json")
    assert ran.exit_code == 4
    wrong = {each["file"]: each["verdict"] for each in json.loads(ran.stdout)["files"] if each["verdict"] != "whole"}
    assert wrong == {"export/adapter/adapter_model.safetensors": "changed", "report.json": "missing"}
    for name in wrong:
        assert str(copy / name) in ran.stderr
    assert qft("report", "--verify", copy).exit_code == 4


def test_a_damaged_report_is_not_shown(copy: Path) -> None:
    text = (copy / "report.json").read_text()
    (copy / "report.json").write_text(text.replace('"steps": 15', '"steps": 16'))
    ran = qft("report", copy)
    assert (ran.exit_code, ran.stdout) == (4, "")
    assert "report.json: is not what was written" in ran.stderr


def test_a_damaged_export_is_refused_until_its_record_is_removed(copy: Path, tmp_path: Path) -> None:
    export(copy, options("merged", gate=False, out=tmp_path / "out"), View())
    folder = tmp_path / "out" / "merged"
    assert parse_target(str(folder), adapter=None, data=None).plan()
    flip(next(folder.glob("*.safetensors")))
    with pytest.raises(DamagedError, match=r"\.safetensors: is not what was written") as raised:
        parse_target(str(folder), adapter=None, data=None).plan()
    assert f"remove {folder / 'export.json'}" in str(raised.value)
    (folder / "export.json").unlink()
    assert parse_target(str(folder), adapter=None, data=None).plan()


@pytest.mark.parametrize("text", ["", "[]", '{"sha256": 3}', '{"sha256": {"model.safetensors": 3}}', "\0"])
def test_another_programs_documents_say_nothing(text: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "export.json").write_text(text)
    (tmp_path / "manifest.json").write_text(text)
    assert parse_target(str(folder), adapter=None, data=None).plan()
