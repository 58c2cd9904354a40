"""The documents that are read again: what older versions wrote is still read, and nothing of it is lost or changed."""

from __future__ import annotations

import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from qft.cli import recipes
from qft.documents import DOCUMENTS
from qft.documents.manifest import Manifest
from qft.documents.plan import PlanDocument
from qft.documents.registry import VersionManifest
from qft.documents.state import TrainingState, read_state
from qft.documents.training import Evaluation, read_report
from qft.errors import MissingError, RunError
from qft.progress import Step
from qft.registry import ORIGINAL, facts_of, find_shelf
from qft.run.folder import Run
from qft.views.html.page import training_page
from tests.support.cli import qft
from tests.support.reports import report

WRITTEN = Path(__file__).parent / "written"
"""By qft before its documents had classes."""
LINES = [json.loads(line) for line in (WRITTEN / "history.jsonl").read_text().splitlines()]


def written(name: str) -> Any:
    return json.loads((WRITTEN / f"{name}.json").read_text())


CASES = {
    **{name: (name, written(name)) for name in ("plan", "calibration-plan", "calibration-record", "manifest")},
    "version": ("registry", written("registry")),
    "original": ("registry", written("original")),
    **{f"line {number}": ("history", line) for number, line in enumerate(LINES)},
}


def assert_within(old: Any, new: Any) -> None:
    """Every key and value of `old` is in `new`."""
    if isinstance(old, dict):
        assert old.keys() <= new.keys()
        for name in old:
            assert_within(old[name], new[name])
    elif isinstance(old, list):
        assert len(old) == len(new)
        for one, other in zip(old, new, strict=True):
            assert_within(one, other)
    else:
        assert (type(old), old) == (type(new), new)


@pytest.mark.parametrize("case", CASES)
def test_what_was_written_before_is_read_and_kept(case: str) -> None:
    name, document = CASES[case]
    again = DOCUMENTS[name].model_validate(document).model_dump(mode="json")
    assert_within(document, again)
    validator = Draft202012Validator(DOCUMENTS[name].model_json_schema())
    validator.validate(document)
    validator.validate(again)
    assert DOCUMENTS[name].model_validate(again).model_dump(mode="json") == again


@pytest.mark.parametrize("case", CASES)
def test_what_a_newer_version_adds_is_kept(case: str) -> None:
    name, document = CASES[case]
    newer = DOCUMENTS[name].model_validate(document | {"colour": {"of": "red"}})
    assert newer.model_dump(mode="json")["colour"] == {"of": "red"}


def test_what_the_first_version_did_not_write_has_defaults() -> None:
    plan = written("plan")
    del plan["skip_modules"], plan["quantization"]["plugin"], plan["device"]["capability"]
    document = PlanDocument.model_validate(plan)
    assert (document.skip_modules, document.quantization.plugin, document.device.capability) == ([], None, None)
    manifest = Manifest.model_validate({"status": "running"})
    assert (manifest.base, manifest.plugin, manifest.data, manifest.versions) == (None, None, None, {})


def test_a_report_of_before_is_read(tmp_path: Path) -> None:
    """Of a qft that measured neither phases nor what leaks."""
    document = report().model_dump(mode="json")
    new = {"moments", "phases", "peak_child_bytes", "gpu_allocator", "growth_bytes_per_100_steps"}
    new |= {"host_growth_bytes_per_100_steps", "leak_threshold_bytes", "leak"}
    old = document | {"memory": {name: value for name, value in document["memory"].items() if name not in new}}
    del old["settings"], old["memory"]["components"]["undivided"]
    (tmp_path / "report.json").write_text(json.dumps(old))
    read = read_report(tmp_path)
    assert (read.memory.phases, read.memory.leak, read.settings) == ({}, None, None)
    assert read.memory.components == report().memory.components
    assert "60.0 GiB" in training_page(read)


def test_what_libraries_are_given_stays_under_their_names() -> None:
    document = PlanDocument.model_validate(written("plan"))
    assert document.quantization.model_extra
    assert document.quantization.model_extra["bnb_4bit_quant_type"] == "nf4"
    assert document.training.model_extra
    assert document.training.model_extra["adam_beta2"] == 0.999
    assert document.training.checkpointing is False
    before = written("plan")
    del before["training"]["activation_checkpointing"]
    before["training"]["gradient_checkpointing"] = True
    assert PlanDocument.model_validate(before).training.checkpointing is True


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_document_has_a_schema_and_a_place_in_the_help(name: str) -> None:
    schema = json.loads(qft("schema", name).stdout)
    Draft202012Validator.check_schema(schema)
    assert schema["title"] == DOCUMENTS[name].__name__
    assert schema["description"]
    signature = inspect.signature(recipes.schema, eval_str=True).parameters["of"].annotation
    assert name in re.findall(r"[\w-]+", signature.__metadata__[0].help)


def test_what_is_not_finite_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    step = Step(1, math.nan, 1e-4, math.inf, 8, 8, 4, 1, 0.5, 9, 9, skipped=True)
    evaluation = Evaluation(step=1, loss=math.nan, perplexity=math.inf, tokens=4, rows=1)
    path = tmp_path / "qft_state.json"
    assert read_state(path) is None
    path.write_text(TrainingState(steps=[step], evaluations={"step-1": evaluation}).model_dump_json())
    json.loads(path.read_text(), parse_constant=pytest.fail)
    state = read_state(path)
    assert state
    assert repr(state.steps) == repr([step])
    assert repr(state.evaluations["step-1"]) == repr(evaluation)


def test_a_folder_without_a_readable_manifest_is_no_run(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert (run.manifest(), run.base) == (None, None)
    for text in ("", "[]", "{", '{"seed": "seven"}', '{"kind": "version"}'):
        (tmp_path / "manifest.json").write_text(text)
        assert run.manifest() is None


def test_a_status_keeps_what_was_noted_before(tmp_path: Path) -> None:
    run = Run(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(written("manifest") | {"colour": "red"}))
    before = run.manifest()
    run.note(Manifest(status="failed", error="it fell"))
    after = run.manifest()
    assert before
    assert after
    assert (after.status, after.error) == ("failed", "it fell")
    changed = {"status", "error", "updated"}
    assert after.model_dump(exclude=changed) == before.model_dump(exclude=changed)


def test_a_version_of_before_is_read_where_it_lies(tmp_path: Path) -> None:
    for entry, name in (("v1", "registry"), (f"{ORIGINAL}-debba90bfde5", "original")):
        (tmp_path / "m" / entry).mkdir(parents=True)
        (tmp_path / "m" / entry / "manifest.json").write_text(json.dumps(written(name)))
    (tmp_path / "m" / "history.jsonl").write_text((WRITTEN / "history.jsonl").read_text())
    shelf = find_shelf(tmp_path, "m")
    assert shelf.manifest("v1").target == "merged"
    assert shelf.manifest(f"{ORIGINAL}-debba90bfde5").kind == "original"
    assert [event.action for event in shelf.history()] == ["add", "add", "promote", "promote", "rollback"]
    for command in (("list",), ("show", "m", 1), ("diff", "m", 1, 1)):
        assert qft("models", *command, "--registry", tmp_path).exit_code == 0


def test_a_version_that_cannot_be_read_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "m" / "v1").mkdir(parents=True)
    for text in ("", "[]", '{"bytes": "many"}'):
        (tmp_path / "m" / "v1" / "manifest.json").write_text(text)
        with pytest.raises(RunError, match="qft models verify m"):
            find_shelf(tmp_path, "m").manifest("v1")
    for line in ('{"action": "burn"}', '{"action": "add"}', "[]"):
        (tmp_path / "m" / "history.jsonl").write_text(line)
        with pytest.raises(RunError, match="is no record"):
            find_shelf(tmp_path, "m").history()


def test_facts_are_those_of_the_run_of_before(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(MissingError):
        facts_of(tmp_path / "out", run)
    run.mkdir()
    (run / "manifest.json").write_text(json.dumps(written("manifest")))
    facts = facts_of(tmp_path / "out", run)
    assert facts.base
    assert facts.base.model_dump() == written("manifest")["base"] | {"whole": False}
    assert facts.data == written("manifest")["data"]
    assert isinstance(facts, VersionManifest)
    (run / "manifest.json").write_text('{"base": "a name"}')
    with pytest.raises(RunError, match=r"manifest\.json: cannot be read"):
        facts_of(tmp_path / "out", run)
