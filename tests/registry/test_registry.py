"""Versions of exported models: immutable, verified, and valid after a kill at any moment."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from qft import registry as versions
from qft.cli import app
from qft.documents.manifest import Base
from qft.documents.registry import Verdict, VersionManifest
from qft.errors import GateError, MissingError, RecipeError, RunError
from tests.support.forked import ended
from tests.support.paths import ROOT
from tests.support.versions import PASSED, RECIPE, artifact, digest, exported

FAILED = {"passed": False, "engine": "transformers", "checks": [{"name": "kl", "value": 3.0, "passed": False}]}


def qft(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["models", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    """A base model's folder, and what a run's manifest says of it."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"the original weights")
    return {"path": str(folder), "commit": None, "sha256": {"model.safetensors": digest(folder / "model.safetensors")}}


@pytest.fixture
def three(registry: Path, tmp_path: Path, base: dict[str, Any]) -> Path:
    """A registry with v1, v2 and v3 of the model m, all of which pass; none is current."""
    for number in (1, 2, 3):
        facts = known(gate=PASSED, base=base, scores={"loss": 1 / number})
        versions.add(registry, "m", artifact(tmp_path / f"out{number}", f"weights {number}"), facts)
    return registry


def verify(registry: Path, name: str, *version: Any) -> None:
    """Raises what `qft models verify` refuses."""
    result = qft("verify", name, *version, "--registry", registry, "--json")
    if problems := json.loads(result.stdout)["problems"]:
        raise GateError("\n".join(f"{name}: {text}" for text in problems))


def known(**facts: Any) -> VersionManifest:
    """What is known of an artifact."""
    return VersionManifest.model_validate(facts)


def current(registry: Path) -> str | None:
    return versions.find_shelf(registry, "m").current()


def history(registry: Path) -> list[tuple[str, str | None, str]]:
    return [(event.action, event.start, event.to) for event in versions.find_shelf(registry, "m").history()]


def test_a_version_is_a_read_only_copy_with_its_facts(three: Path, tmp_path: Path) -> None:
    manifest = versions.find_shelf(three, "m").manifest("v2")
    shutil.rmtree(tmp_path / "out2")
    file = three / "m" / "v2" / "artifact" / "model.safetensors"
    assert file.read_text() == "weights 2"
    assert manifest.sha256
    assert manifest.sha256["model.safetensors"] == digest(file)
    assert set(manifest.sha256) == {"model.safetensors", "inner/config.json"}
    assert manifest.bytes == len("weights 2") + len("{}")
    assert (manifest.gate, manifest.scores) == (Verdict.model_validate(PASSED), {"loss": 0.5})
    files = [path for path in (three / "m" / "v2").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o444}
    assert versions.problems(three, "m") == []
    assert current(three) is None


def test_a_number_is_given_once(three: Path, tmp_path: Path) -> None:
    shutil.rmtree(three / "m" / "v3")
    assert versions.add(three, "m", tmp_path / "out1", known()) == 4


def test_promote_and_every_way_back(three: Path, tmp_path: Path, base: dict[str, Any]) -> None:
    for number in (1, 2, 3):
        versions.promote(three, "m", number, reason="better")
    assert os.readlink(three / "m" / "current") == "v3"
    assert (three / "m" / "current" / "artifact" / "model.safetensors").read_text() == "weights 3"
    assert versions.rollback(three, "m", reason="worse") == "v2"
    assert versions.rollback(three, "m") == "v1"
    with pytest.raises(RunError, match="nothing was current before v1"):
        versions.rollback(three, "m")
    assert versions.rollback(three, "m", 3) == "v3"
    entry = versions.rollback(three, "m", "original")
    assert entry.startswith("original-")
    assert current(three) == entry
    assert versions.find_shelf(three, "m").manifest(entry).base == Base(**base)
    assert (Path(base["path"]) / "model.safetensors").read_bytes() == b"the original weights"
    assert versions.rollback(three, "m") == "v3"
    assert history(three)[3:] == [
        ("promote", None, "v1"),
        ("promote", "v1", "v2"),
        ("promote", "v2", "v3"),
        ("rollback", "v3", "v2"),
        ("rollback", "v2", "v1"),
        ("rollback", "v1", "v3"),
        ("rollback", "v3", entry),
        ("rollback", entry, "v3"),
    ]
    assert versions.problems(three, "m") == []


def test_the_original_must_be_what_it_was(three: Path, base: dict[str, Any]) -> None:
    versions.promote(three, "m", 1)
    (Path(base["path"]) / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(GateError, match=r"model\.safetensors: changed"):
        versions.rollback(three, "m", "original")
    assert current(three) == "v1"
    versions.rollback(three, "m", "original", force=True)
    assert versions.find_shelf(three, "m").history()[-1].forced is True
    with pytest.raises(GateError, match="changed"):
        verify(three, "m", "original")


def test_no_way_to_an_original_that_nobody_recorded(registry: Path, tmp_path: Path) -> None:
    versions.add(registry, "m", artifact(tmp_path / "out"), known(gate=PASSED))
    with pytest.raises(RunError, match="nothing is current"):
        versions.rollback(registry, "m")
    versions.promote(registry, "m", 1)
    with pytest.raises(RunError, match="the base was not recorded"):
        versions.rollback(registry, "m", "original")


@pytest.mark.parametrize("gate", [FAILED, {**PASSED, "passed": None}, None])
def test_what_did_not_pass_is_current_only_by_force(gate: Any, registry: Path, tmp_path: Path) -> None:
    for verdict in (PASSED, gate):
        out = tmp_path / "out" if registry.exists() else artifact(tmp_path / "out")
        versions.add(registry, "m", out, known(gate=verdict))
    versions.promote(registry, "m", 1)
    for step in (versions.promote, versions.rollback):
        with pytest.raises(GateError, match="--force"):
            step(registry, "m", 2)
    assert current(registry) == "v1"
    versions.promote(registry, "m", 2, force=True, reason="a test")
    assert versions.find_shelf(registry, "m").history()[-1].forced is True
    assert current(registry) == "v2"


def test_verify_names_what_changed_is_missing_and_is_extra(three: Path) -> None:
    folder = three / "m" / "v2" / "artifact"
    changed = folder / "model.safetensors"
    changed.chmod(0o644)
    changed.write_bytes(bytes([changed.read_bytes()[0] ^ 1]) + changed.read_bytes()[1:])
    (folder / "inner" / "config.json").unlink()
    (folder / "inner" / "new.py").write_text("")
    with pytest.raises(GateError) as raised:
        verify(three, "m", 2)
    assert str(raised.value).splitlines() == [
        "m: v2: artifact/inner/config.json: missing",
        "m: v2: artifact/model.safetensors: changed",
        "m: v2: artifact/inner/new.py: not in the manifest",
    ]
    verify(three, "m", 1)
    with pytest.raises(GateError, match="v2"):
        verify(three, "m")
    with pytest.raises(GateError, match="changed"):
        versions.promote(three, "m", 2)
    result = qft("verify", "m", "--registry", three, "--json")
    assert result.exit_code == 4
    document = json.loads(result.stdout)
    assert document["valid"] is False
    assert [entry["whole"] for entry in document["entries"]] == [True, False, True]


def test_verify_holds_the_manifest_to_the_history(three: Path) -> None:
    manifest = three / "m" / "v1" / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_text(manifest.read_text().replace('"passed": true', '"passed": null', 1))
    with pytest.raises(GateError, match=r"v1: manifest\.json: changed"):
        verify(three, "m", 1)


@pytest.mark.parametrize("damage", ["pointer", "dangling", "history", "moved"])
def test_a_damaged_folder_is_not_valid(damage: str, three: Path) -> None:
    """There is a way out of it: see test_damaged_registry."""
    folder = three / "m"
    versions.promote(three, "m", 1)
    versions.promote(three, "m", 2)
    if damage == "history":
        (folder / "history.jsonl").write_text('{"action"')
    else:
        (folder / "current").unlink()
        target = {"pointer": "../../etc", "dangling": "v9", "moved": "v3"}[damage]
        (folder / "current").symlink_to(target)
    assert versions.problems(three, "m")


@pytest.mark.parametrize("name", ["", ".", "..", "../m", "a/b", "/m", ".hidden", "a\n", "a\\b", "-m", "é", "a" * 65])
def test_names_lead_nowhere_else(name: str, registry: Path, tmp_path: Path) -> None:
    out = artifact(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RecipeError, match="name"):
        versions.add(registry, name, out, known())
    with pytest.raises(RecipeError, match="name"):
        versions.promote(registry, name, 1)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_artifact_in_read_only_folders_can_be_added(registry: Path, tmp_path: Path) -> None:
    out = artifact(tmp_path / "out")
    (out / "inner").chmod(0o555)
    versions.add(registry, "m", out, known())
    assert (registry / "m" / "v1" / "artifact" / "inner").stat().st_mode & 0o777 == 0o755
    (out / "inner").chmod(0o755)


def test_what_cannot_be_added(registry: Path, tmp_path: Path) -> None:
    out = artifact(tmp_path / "out")
    with pytest.raises(MissingError):
        versions.add(registry, "m", tmp_path / "none", known())
    with pytest.raises(RecipeError, match="colour"):
        versions.add(registry, "m", out, known(colour="red"))
    with pytest.raises(RunError, match="holds the registry"):
        versions.add(registry, "m", tmp_path, known())
    with pytest.raises(RunError, match="no JSON"):
        versions.add(registry, "m", out, known(scores={"loss": float("nan")}))
    with pytest.raises(GateError, match=r"model\.safetensors"):
        versions.add(registry, "m", out, known(sha256={"model.safetensors": "0" * 64}))
    (out / "dangling").symlink_to("nowhere")
    with pytest.raises(RunError, match="cannot be copied"):
        versions.add(registry, "m", out, known())
    assert versions.names(registry) == []
    assert [path.name for path in (registry / "m").iterdir() if path.is_dir()] == []


def run_python(code: str, *arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)


ADD = """
import sys
from functools import partial
from pathlib import Path
from qft.documents.registry import VersionManifest
from qft.registry import add
print("ready", flush=True)
for _ in range(5):
    print(add(Path(sys.argv[1]), "m", Path(sys.argv[2]), VersionManifest(gate={"passed": True})))
"""


def test_two_adds_at_once_take_different_numbers(registry: Path, tmp_path: Path) -> None:
    out = artifact(tmp_path / "out")
    both = [run_python(ADD, registry, out) for _ in range(2)]
    numbers = [int(line) for process in both for line in process.communicate()[0].split()[1:]]
    assert sorted(numbers) == list(range(1, 11))
    assert versions.problems(registry, "m") == []


def make_step(folder: Path, out: Path, step: str, last: int) -> None:
    """Make it, and say how many lines it ran, of qft or of what it calls; the process kills itself at the `last`."""
    lines = 0

    def count(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += 1
        if lines == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return count

    promoted = [event.to for event in versions.find_shelf(folder, "m").history() if event.action == "promote"]
    target = {"v1": 2, "v2": 3, "v3": 1}[str(promoted[-1])]
    sys.settrace(count)
    if step == "add":
        versions.add(folder, "m", out, known())
    else:
        versions.promote(folder, "m", target)
    sys.settrace(None)
    sys.stdout.write(str(lines))


@pytest.mark.parametrize("step", ["add", "promote"])
def test_a_kill_at_any_line_leaves_a_valid_registry(step: str, three: Path, tmp_path: Path) -> None:
    out = tmp_path / "out1"
    versions.promote(three, "m", 1)
    lines = int(ended(partial(make_step, three, out, step, 0)).stdout)
    chosen = random.Random(0)
    moments = [chosen.randrange(lines * i // 9 + 1, lines * (i + 1) // 9 + 1) for i in range(9)]
    moments += [chosen.randrange(lines * 9 // 10, lines) for _ in range(15)]  # most of a promote is reading and hashing
    torn = 0
    for moment in moments:
        before = versions.find_shelf(three, "m").numbers()
        assert ended(partial(make_step, three, out, step, moment)).returncode == -signal.SIGKILL
        assert versions.problems(three, "m") == [], moment
        assert set(before) <= set(versions.find_shelf(three, "m").numbers())
        torn += any(path.name not in (".lock", ".add.lock") for path in (three / "m").glob(".*"))
        torn += step == "promote" and versions.find_shelf(three, "m").history()[-1].to != current(three)
    assert torn
    versions.add(three, "m", out, known())
    assert {path.name for path in (three / "m").glob(".*")} == {".lock", ".add.lock"}
    assert versions.problems(three, "m") == []


def test_what_a_killed_step_left_goes_with_the_next_step(three: Path) -> None:
    for name in (".current.1", ".history.jsonl.qft-1-1-abcdefgh"):
        (three / "m" / name).touch()
    versions.promote(three, "m", 1)
    assert {path.name for path in (three / "m").glob(".*")} <= {".lock", ".add.lock"}


def test_the_next_command_takes_the_step_that_was_cut_off(three: Path, tmp_path: Path) -> None:
    versions.promote(three, "m", 1)
    shelf = versions.find_shelf(three, "m")
    shelf.append("promote", "v1", "v2", "cut off before current was replaced")
    assert (current(three), versions.problems(three, "m")) == ("v1", [])
    versions.add(three, "m", tmp_path / "out1", known())
    assert current(three) == "v2"
    lines = (three / "m" / "history.jsonl").read_text().splitlines()
    (three / "m" / "history.jsonl").write_text("".join(f"{line}\n" for line in lines[:-1]))
    assert versions.problems(three, "m") == []
    versions.promote(three, "m", 3)
    assert history(three)[-2:] == [("add", None, "v4"), ("promote", "v2", "v3")]
    assert shelf.history()[-2].recovered is True


def test_a_retry_of_what_was_cut_off_does_it_once(three: Path) -> None:
    for number in (1, 2, 3):
        versions.promote(three, "m", number)
    shelf = versions.find_shelf(three, "m")
    shelf.append("rollback", "v3", "v2", "cut off")
    assert versions.rollback(three, "m") == "v2"
    shelf.append("promote", "v2", "v3", "cut off")
    versions.promote(three, "m", 3)
    assert (current(three), len(history(three))) == ("v3", 8)
    assert versions.problems(three, "m") == []


def test_the_commands(registry: Path, tmp_path: Path, base: dict[str, Any]) -> None:
    where = ("--registry", registry)
    for rank in (4, 8):
        out, run = exported(tmp_path / f"out{rank}", tmp_path / f"run{rank}", base, rank)
        result = qft("add", "m", out, "--run", run, *where)
        assert result.exit_code == 0, result.output
        assert "added; next: qft models promote m" in result.stdout
    assert qft("promote", "m", "v1", *where).exit_code == 0
    assert qft("promote", "m", 2, "--reason", "better", *where).exit_code == 0
    listed = json.loads(qft("list", "--json", *where).stdout)["models"]["m"]
    assert (listed["current"], list(listed["versions"])) == ("v2", ["v1", "v2"])
    shown = json.loads(qft("show", "m", "--json", *where).stdout)
    assert shown["entry"] == "v2"
    assert shown["manifest"]["recipe"]["text"] == RECIPE.format(r=8)
    assert shown["manifest"]["scores"] == {"loss": 0.125, "perplexity": 2.0, "exact_match": 0.5}
    assert shown["history"][-1]["reason"] == "better"
    rows = json.loads(qft("diff", "m", "1", "2", "--json", *where).stdout)["rows"]
    found = {(row["section"], row["field"]): (row["a"], row["b"]) for row in rows}
    assert found["recipe", "adapter.r"] == (4, 8)
    assert found["data", "rows.jsonl"] == ("4" * 64, "8" * 64)
    assert found["gate", "kl"] == (0.01, 0.01)
    assert found["scores", "loss"] == (0.25, 0.125)
    assert ("recipe", "seed") not in found
    assert json.loads(qft("verify", "m", "--json", *where).stdout)["valid"] is True
    assert "v1 is current" in qft("rollback", "m", *where).stdout
    assert base["path"] in qft("rollback", "m", "--to", "original", *where).stdout.replace("\n", "")
    for command in (("list",), ("show", "m"), ("show", "m", 1), ("diff", "m", 1, 2), ("verify", "m")):
        result = qft(*command, *where)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.strip()


def test_the_run_and_the_export_must_agree(registry: Path, tmp_path: Path, base: dict[str, Any]) -> None:
    out, run = exported(tmp_path / "out", tmp_path / "run", base, 4)
    (run / "manifest.json").write_text(json.dumps({"base": base | {"commit": "other"}}))
    assert qft("add", "m", out, "--run", run, "--registry", registry).exit_code == 7
    assert qft("add", "m", out, "--run", tmp_path, "--registry", registry).exit_code == 3
    document = json.loads((out / "export.json").read_text())
    for wrong in ({"gate": "passed"}, {"sha256": None}, {"sha256": ["a"]}):
        (out / "export.json").write_text(json.dumps(document | wrong))
        assert qft("add", "m", out, "--registry", registry).exit_code == 7
    (out / "export.json").write_text(json.dumps(document))
    (out / "model.safetensors").write_text("retouched")
    assert qft("add", "m", out, "--registry", registry).exit_code == 4


def test_mistakes_have_their_exit_codes(three: Path) -> None:
    where = ("--registry", three)
    assert qft("show", "m", *where).exit_code == 3
    assert qft("show", "n", *where).exit_code == 3
    assert qft("show", "../m", 1, *where).exit_code == 2
    assert qft("promote", "m", "latest", *where).exit_code == 2
    assert qft("promote", "m", 9, *where).exit_code == 3
    assert qft("promote", "m", 1, *where).exit_code == 0
    assert qft("promote", "m", 1, *where).exit_code == 7
    assert qft("list", "--registry", three / "none").exit_code == 0
