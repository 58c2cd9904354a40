"""A registry of which a part is damaged: that part is told by name, all else is shown, and there is a way back."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from qft import registry as versions
from qft.documents.registry import VersionManifest
from qft.errors import RunError
from tests.support.cli import qft
from tests.support.versions import PASSED, artifact, digest, exported

GARBAGE = bytes(range(256)) * 4
ADVICE = re.compile(r"`(qft models [^`]*)`")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry: m with v1, v2 and v3, of which v1 and then v2 became current, and n with v1; and out, an artifact."""
    folder = tmp_path_factory.mktemp("kept")
    original = folder / "base" / "model.safetensors"
    original.parent.mkdir()
    original.write_text("the original weights")
    base = {"path": str(original.parent), "commit": None, "sha256": {original.name: digest(original)}}
    facts = VersionManifest.model_validate({"gate": PASSED, "base": base, "scores": {"loss": 1.0}})
    for number in (1, 2, 3):
        versions.add(folder / "models", "m", artifact(folder / f"out{number}", f"weights {number}"), facts)
    versions.add(folder / "models", "n", folder / "out1", facts)
    for number in (1, 2):
        versions.promote(folder / "models", "m", number)
    artifact(folder / "out")
    return folder


@pytest.fixture
def registry(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept / "models", tmp_path / "my models", symlinks=True))


def models(registry: Path, *arguments: Any) -> Result:
    ran = qft("models", *arguments, "--registry", registry)
    assert "Traceback" not in ran.output
    return ran


def listed(registry: Path) -> Any:
    ran = models(registry, "list", "--json")
    assert ran.exit_code == 0, ran.stderr
    return json.loads(ran.stdout)["models"]


def is_current(registry: Path) -> str | None:
    return versions.find_shelf(registry, "m").current()


def rewrite(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        if path.exists():
            path.chmod(0o644)
        path.unlink(missing_ok=True)
        path.write_bytes(content)

    return damage


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        rewrite(name, json.dumps(values).encode())(folder)

    return damage


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else in its place."""

    def damage(folder: Path) -> None:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        make(path)

    return damage


def filled(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("mine")


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def nothing(path: Path) -> None:
    pass


def torn(folder: Path) -> None:
    path = folder / "history.jsonl"
    path.write_bytes(path.read_bytes()[:-20])


def both_locks(folder: Path) -> None:
    for name in (".lock", ".add.lock"):
        replaced(name, filled)(folder)


def line_of(number: int, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        lines = (folder / "history.jsonl").read_bytes().splitlines()
        lines[number] = content
        (folder / "history.jsonl").write_bytes(b"\n".join(lines) + b"\n")

    return damage


def escape(values: dict[str, Any]) -> None:
    values.update(sha256={"../../../../etc/passwd": "0" * 64})


MANIFEST = "v2/manifest.json"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "an empty history": (rewrite("history.jsonl", b""), "current: leads to v2"),
    "a history of garbage": (rewrite("history.jsonl", GARBAGE), "history.jsonl:1: is no record"),
    "a history of other JSON": (rewrite("history.jsonl", b"[]\n3\nnull\n"), "history.jsonl:2: is no record"),
    "a history that is cut": (torn, "history.jsonl:5: is no record"),
    "a history of unknown actions": (line_of(1, b'{"action": "burn"}'), "history.jsonl:2: is no record"),
    "a history that leads out": (
        line_of(4, b'{"time": "", "action": "promote", "from": "v1", "to": "../../x", "reason": ""}'),
        "history.jsonl:5: is no record",
    ),
    "a history that is a folder": (replaced("history.jsonl", filled), "history.jsonl: cannot be read"),
    "a history that is a pipe": (replaced("history.jsonl", os.mkfifo), "history.jsonl: cannot be read"),
    "a history that leads nowhere": (replaced("history.jsonl", link("gone")), "history.jsonl: cannot be read"),
    "no history": (replaced("history.jsonl", nothing), "current: leads to v2"),
    "a current that leads nowhere": (replaced("current", link("v9")), "current: leads to v9"),
    "a current that leads elsewhere": (replaced("current", link("../n/v1")), "current: is no link to a version"),
    "a current that leads to itself": (replaced("current", link("current")), "current: is no link to a version"),
    "a current that is a file": (rewrite("current", b"v2"), "current: is no link to a version"),
    "a current that is a folder": (replaced("current", filled), "current: is no link to a version"),
    "a current that was moved": (replaced("current", link("v3")), "current: leads to v3, and by the history to v2"),
    "no current": (replaced("current", nothing), "current: leads to nothing, and by the history to v2"),
    "a lock that is a folder": (replaced(".lock", filled), ".lock: is no file"),
    "a lock that is a pipe": (replaced(".lock", os.mkfifo), ".lock: is no file"),
    "a lock that leads nowhere": (replaced(".add.lock", link("no/where")), ".add.lock: is no file"),
    "two locks that are folders": (both_locks, ".add.lock: is no file"),
    "an empty manifest": (rewrite(MANIFEST, b""), "v2"),
    "a manifest of garbage": (rewrite(MANIFEST, GARBAGE), "v2"),
    "a manifest of another kind": (rewrite(MANIFEST, b'{"kind": "run"}'), "v2"),
    "a manifest that nests without end": (rewrite(MANIFEST, b"[" * 100_000), "v2"),
    "a manifest without keys": (rewrite(MANIFEST, b"{}"), "v2"),
    "a manifest that is a pipe": (replaced(MANIFEST, os.mkfifo), "v2"),
    "a manifest that is a folder": (replaced(MANIFEST, filled), "v2"),
    "no manifest": (replaced(MANIFEST, nothing), "v2"),
    "a gate that is a word": (edited(MANIFEST, lambda values: values.update(gate="passed")), "v2"),
    "a gate whose checks are a number": (edited(MANIFEST, lambda values: values["gate"].update(checks=3)), "v2"),
    "a gate that was changed": (edited(MANIFEST, lambda values: values["gate"].update(passed=None)), "v2"),
    "hashes that are a list": (edited(MANIFEST, lambda values: values.update(sha256=["a"])), "v2"),
    "hashes of other files": (edited(MANIFEST, escape), "v2"),
    "a version that is a file": (replaced("v2", Path.touch), "v2"),
    "a version that leads nowhere": (replaced("v2", link("gone")), "v2"),
    "a version that leads to itself": (replaced("v2", link("v2")), "v2"),
    "an empty version": (replaced("v2", Path.mkdir), "v2"),
    "no version": (replaced("v2", nothing), "current: leads to v2"),
    "an artifact that is gone": (replaced("v2/artifact", nothing), "v2: artifact/model.safetensors: missing"),
    "an artifact that is a file": (replaced("v2/artifact", Path.touch), "v2: artifact/model.safetensors"),
    "a file that is a pipe": (replaced("v2/artifact/model.safetensors", os.mkfifo), "v2: artifact/model.safetensors"),
}
HASHED = ("an artifact", "a file that", "a gate that was changed", "hashes of other", "a manifest without keys")
"""Seen by hashing alone, so not by `list`."""


def seen_at_once(name: str) -> bool:
    return not name.startswith(HASHED)


@pytest.fixture(params=DAMAGES)
def damaged(request: pytest.FixtureRequest, registry: Path) -> tuple[Path, str, str]:
    """The registry, what was done to it, and what is to be told of that."""
    damage, told = DAMAGES[request.param]
    damage(registry / "m")
    return registry, request.param, told


def test_all_that_is_good_is_shown_and_the_damage_named(damaged: tuple[Path, str, str]) -> None:
    registry, name, told = damaged
    found = listed(registry)
    assert {"v1", "v3"} <= found["m"]["versions"].keys()
    assert (list(found["n"]["versions"]), found["n"]["problems"]) == (["v1"], [])
    assert (told.partition(":")[0] in "\n".join(found["m"]["problems"])) is seen_at_once(name)
    assert models(registry, "list").exit_code == 0
    for which in (("1",), ("3",), ()):
        ran = models(registry, "show", "m", *which, "--json")
        if ran.exit_code == 3:
            assert not which
            assert "nothing is current" in ran.stderr or "has no v2" in ran.stderr
            continue
        assert ran.exit_code == 0, ran.stderr
        assert json.loads(ran.stdout)["problems"] == found["m"]["problems"]
        assert models(registry, "show", "m", *which).exit_code == 0
    ran = models(registry, "verify", "m", "--json")
    assert ran.exit_code == 4
    assert told in ran.stderr
    assert {"v1", "v3"} <= {each["entry"] for each in json.loads(ran.stdout)["entries"] if each["whole"]}
    assert models(registry, "verify", "m", "3").exit_code == 0
    assert models(registry, "diff", "m", "1", "3").exit_code == 0


@pytest.mark.parametrize("way", ["promote m 3", "promote m 1", "rollback m --to 1", "rollback m"])
def test_there_is_a_way_to_another_version(way: str, damaged: tuple[Path, str, str]) -> None:
    registry, name, _ = damaged
    before = {path: path.read_bytes() for path in registry.rglob("v[13]/artifact/*") if path.is_file()}
    ran = models(registry, *way.split())
    if way == "rollback m":  # what was current before may be known no more
        unknown = "history" in name or name == "a current that was moved"
        assert ran.exit_code in ((0, 4, 7) if unknown else (0,)), ran.stderr
    elif (way, name) == ("promote m 3", "a current that was moved"):
        assert ran.exit_code == 0, ran.stderr
    else:
        assert ran.exit_code == 0, ran.stderr
        assert is_current(registry) == f"v{way[-1]}"
        assert (registry / "m" / "current" / "artifact" / "model.safetensors").read_text() == f"weights {way[-1]}"
    assert {path: path.read_bytes() for path in before} == before


def test_versions_are_still_added_and_none_gets_an_old_number(damaged: tuple[Path, str, str], kept: Path) -> None:
    registry, _, _ = damaged
    ran = models(registry, "add", "m", kept / "out")
    assert ran.exit_code == 0, ran.stderr
    assert "m v4 added" in ran.stdout
    assert models(registry, "verify", "m", "4").exit_code == 0
    assert models(registry, "promote", "m", "4", "--force").exit_code == 0
    assert is_current(registry) == "v4"


def test_each_advice_works_when_followed(damaged: tuple[Path, str, str], tmp_path: Path) -> None:
    registry, _, _ = damaged
    said = [models(registry, *command.split()).output for command in ("list", "show m 3", "verify m", "verify m 2")]
    for number, command in enumerate(sorted({found for text in said for found in ADVICE.findall(text)})):
        copy = tmp_path / str(number)
        subprocess.run(["cp", "-a", str(registry), str(copy)], check=True)  # pipes too
        words = shlex.split(command.replace(shlex.quote(str(registry)), shlex.quote(str(copy))))
        ran = qft(*words[1:])
        assert ran.exit_code == (4 if words[2] == "verify" else 0), (command, ran.stderr)


@pytest.mark.parametrize("name", [name for name in DAMAGES if "current" in name or name == "no version"])
def test_what_mends_current_leaves_a_valid_registry(name: str, registry: Path) -> None:
    DAMAGES[name][0](registry / "m")
    [problem] = listed(registry)["m"]["problems"]
    advice = shlex.split(ADVICE.findall(problem)[0])
    assert qft(*advice[1:]).exit_code == 0
    assert models(registry, "verify", "m").exit_code == 0
    assert listed(registry)["m"]["problems"] == []


@pytest.mark.parametrize("name", [name for name in DAMAGES if "history" in name])
def test_a_history_is_valid_again_without_its_damaged_lines(name: str, registry: Path) -> None:
    DAMAGES[name][0](registry / "m")
    path = registry / "m" / "history.jsonl"
    numbers = [int(number) for number in re.findall(r"jsonl:(\d+): ", models(registry, "verify", "m").stderr)]
    if numbers:
        lines = path.read_bytes().split(b"\n")
        path.write_bytes(b"\n".join(line for i, line in enumerate(lines, start=1) if i not in numbers))
    assert models(registry, "promote", "m", "3").exit_code == 0
    assert models(registry, "verify", "m").exit_code == 0
    assert listed(registry)["m"]["problems"] == []


def test_damaged_lines_stay_where_they_are(registry: Path) -> None:
    path = registry / "m" / "history.jsonl"
    torn(registry / "m")
    before = path.read_bytes()
    assert models(registry, "promote", "m", "3").exit_code == 0
    assert path.read_bytes().startswith(before + b"\n")
    assert len(versions.find_shelf(registry, "m").read_history().damaged) == 1


def test_what_is_in_the_way_is_kept_aside(registry: Path) -> None:
    for name in ("history.jsonl", "current"):
        replaced(name, filled)(registry / "m")
    assert models(registry, "promote", "m", "3").exit_code == 0
    assert (registry / "m" / "history.jsonl.damaged" / "file").read_text() == "mine"
    assert (registry / "m" / "current.damaged" / "file").read_text() == "mine"


def test_a_number_in_a_damaged_line_is_not_given_again(registry: Path, kept: Path) -> None:
    shutil.rmtree(registry / "m" / "v3")
    line_of(2, b'{"action": "add", "to": "v3"')(registry / "m")
    assert "m v4 added" in models(registry, "add", "m", kept / "out").stdout


def test_a_reason_of_any_text_is_one_line(registry: Path) -> None:
    reason = "a\u2028b\x85c\nd\udc80"
    versions.promote(registry, "m", 3, reason=reason)
    events = versions.find_shelf(registry, "m").history()
    assert events[-1].reason == reason.replace("\udc80", "?")
    assert versions.problems(registry, "m") == []


LEFT: dict[str, Callable[[Path], None]] = {
    ".add.killed": filled,
    ".add.file": Path.touch,
    ".add.link": link("../../elsewhere"),
    ".current.0123": Path.mkdir,
    ".history.jsonl.half": filled,
    ".original-0123": Path.touch,
    ".add.pipe": os.mkfifo,
}


def test_half_written_things_are_ignored_and_then_removed(registry: Path, kept: Path) -> None:
    elsewhere = registry.parent / "elsewhere"
    filled(elsewhere)
    elsewhere.chmod(0o700)
    for name, make in LEFT.items():
        make(registry / "m" / name)
    assert models(registry, "verify", "m").exit_code == 0
    assert listed(registry)["m"]["problems"] == []
    assert models(registry, "add", "m", kept / "out").exit_code == 0
    assert {path.name for path in (registry / "m").glob(".*")} == {".lock", ".add.lock"}
    assert (elsewhere / "file").read_text() == "mine"
    assert elsewhere.stat().st_mode & 0o777 == 0o700


def test_what_has_no_number_is_no_version(registry: Path) -> None:
    for name in ("v0", "v01", "v-1", "vx", "v1.5", "v" + "9" * 200, "V2", "original-mine", "notes"):
        filled(registry / "m" / name)
    assert list(listed(registry)["m"]["versions"]) == ["v1", "v2", "v3"]
    assert models(registry, "verify", "m").exit_code == 0
    for text in ("v0", "0", "x", "-1", "1.5", "9" * 5000, "¹"):
        assert models(registry, "show", "m", "--", text).exit_code == 2
        assert models(registry, "promote", "m", "--", text).exit_code == 2


def test_names_that_differ_by_case_are_two_models(registry: Path, kept: Path) -> None:
    assert "M v1 added" in models(registry, "add", "M", kept / "out").stdout
    found = listed(registry)
    assert [list(found[name]["versions"]) for name in ("M", "m", "n")] == [["v1"], ["v1", "v2", "v3"], ["v1"]]


def test_what_is_no_registry_is_one_message(kept: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/qft")):
        ran = models(where, "add", "m", kept / "out")
        assert ran.exit_code == 7, ran.stderr
        assert str(where) in ran.stderr
    assert models(tmp_path / "file", "list").exit_code == 7
    assert models(tmp_path / "file", "verify", "m").exit_code in (3, 7)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m").write_text("")
    assert models(tmp_path / "models", "add", "m", kept / "out").exit_code == 7
    assert models(tmp_path / "models", "list").exit_code == 0


def test_a_damaged_record_of_the_base_is_made_anew(registry: Path) -> None:
    entry = versions.rollback(registry, "m", "original")
    assert models(registry, "rollback", "m").exit_code == 0
    manifest = registry / "m" / entry / "manifest.json"
    for content in (b"", b"{}", GARBAGE):
        manifest.chmod(0o644)
        manifest.write_bytes(content)
        assert (entry in "".join(listed(registry)["m"]["problems"])) is (content != b"{}")
        assert models(registry, "rollback", "m", "--to", "original").exit_code == 0
        assert models(registry, "verify", "m").exit_code == 0
        assert models(registry, "rollback", "m").exit_code == 0


@pytest.mark.parametrize("path", ["package:os.path/x", "package:/", "a/b/c/d", "", "\0", "package:no such/x"])
def test_a_base_of_any_name_is_missing(path: str, registry: Path) -> None:
    entry = versions.rollback(registry, "m", "original")
    edited(f"{entry}/manifest.json", lambda values: values["base"].update(path=path))(registry / "m")
    ran = models(registry, "verify", "m", "original")
    assert ran.exit_code == 4
    assert "missing" in ran.stderr


@pytest.mark.parametrize("text", ["a: [", "- a", "&a {b: *a}", "\0", "3"])
def test_a_recipe_of_any_text_is_compared(text: str, registry: Path) -> None:
    recipe = {"path": "recipe.yaml", "sha256": "0", "text": text}
    edited("v1/manifest.json", lambda values: values.update(recipe=recipe))(registry / "m")
    assert models(registry, "diff", "m", "1", "3").exit_code == 0


def test_what_was_added_without_a_gate_is_promoted_as_told(registry: Path, kept: Path) -> None:
    said = models(registry, "add", "m", kept / "out").stdout
    words = shlex.split(said.partition("next: ")[2].partition(" (")[0])
    assert qft(*words[1:]).exit_code == 0
    assert is_current(registry) == "v4"


def test_the_way_out_of_a_first_version_is_told_and_works(kept: Path, tmp_path: Path) -> None:
    registry = tmp_path / "models"
    for number in (1, 2):
        facts = VersionManifest.model_validate({"gate": PASSED})
        assert versions.add(registry, "m", kept / "out", facts) == number
    versions.promote(registry, "m", 1)
    ran = models(registry, "rollback", "m")
    assert ran.exit_code == 7
    for command in ADVICE.findall(ran.stderr):
        assert qft(*shlex.split(command)[1:]).exit_code == 0, command
    with pytest.raises(RunError, match="the base was not recorded"):
        versions.rollback(registry, "m", "original")


def test_a_version_that_is_not_what_was_added_is_replaced_as_told(registry: Path, kept: Path) -> None:
    rewrite("v2/artifact/model.safetensors", b"other")(registry / "m")
    models(registry, "promote", "m", "3")
    ran = models(registry, "rollback", "m", "--to", "2")
    assert ran.exit_code == 4
    assert f"move {registry / 'm' / 'v2'} away" in ran.stderr
    os.rename(registry / "m" / "v2", registry.parent / "v2")
    assert models(registry, "add", "m", kept / "out2").exit_code == 0
    assert models(registry, "verify", "m").exit_code == 0


FACTS: dict[str, Callable[[Path], None]] = {
    "a report that is a pipe": replaced("report.json", os.mkfifo),
    "a report without a reading": rewrite("report.json", b'{"eval": 3}'),
    "a calibration without attempts": rewrite("report.json", b'{"kind": "calibration", "attempts": []}'),
    "scores that are words": rewrite("report.json", b'{"eval": {"after": {"loss": "low"}}}'),
    "a recipe of garbage": rewrite("recipe.yaml", GARBAGE),
    "a manifest that nests without end": rewrite("manifest.json", b"[" * 100_000),
    "a manifest that is a pipe": replaced("manifest.json", os.mkfifo),
}


@pytest.mark.parametrize("name", FACTS)
def test_a_damaged_run_is_told_by_its_file(name: str, kept: Path, tmp_path: Path) -> None:
    base = {"path": "base", "commit": None, "sha256": {"model.safetensors": "0" * 64}}
    out, run = exported(tmp_path / "out", tmp_path / "run", base, 4)
    FACTS[name](run)
    ran = models(tmp_path / "models", "add", "m", out, "--run", run)
    assert ran.exit_code == 7, ran.stderr
    assert str(run) in ran.stderr
    assert not (tmp_path / "models").exists()
