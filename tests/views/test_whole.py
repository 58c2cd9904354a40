"""What people copy from the terminal stands whole on its line, as it is, however narrow the terminal."""

from __future__ import annotations

import io
from collections.abc import Callable
from html import unescape
from pathlib import Path
from shlex import quote
from typing import Any

import pytest
from rich.console import Console, RenderableType

from qft.cli.shell import tell
from qft.documents.calibration import Attempt, CalibrationReport
from qft.documents.evaluation import Score
from qft.documents.export import ExportDocument, Gate, LoadCheck, Pushed, Registered
from qft.documents.manifest import Base
from qft.documents.plan import CalibrationCheck, PlanDocument
from qft.documents.registry import Difference, RegistryListing, VersionComparison, VersionDetails
from qft.files import write_json
from qft.views.live import LineView, LiveView
from qft.views.terminal.calibration import render_calibration
from qft.views.terminal.export import render_exports, render_loads
from qft.views.terminal.models import render_diff, render_list, render_version
from qft.views.terminal.plan import render_plan
from qft.views.terminal.training import render
from tests.support.cli import qft
from tests.support.reports import report

Show = Callable[[object, Callable[[Any], RenderableType]], list[str]]
FOLDER = f"/home/me/{'long' * 40}"
PATH = f"{FOLDER}/with a [bold]bracket[/bold] :smile:"
MANIFEST = {"created": "2026-01-31T12:00", "base": {"path": PATH}, "run": PATH, "data": {PATH: "0" * 64}}


@pytest.fixture(params=[40, 80, 200])
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return int(request.param)


@pytest.fixture
def lines(columns: int, capsys: pytest.CaptureFixture[str]) -> Show:
    """What a command prints of a document."""

    def shown(document: object, render: Callable[[Any], RenderableType]) -> list[str]:
        tell(document, render, as_json=False)
        return capsys.readouterr().out.splitlines()

    return shown


def told(name: str, value: str, lines: list[str]) -> bool:
    """Whether a line holds the name and then the whole value, and nothing else."""
    return any(line.startswith(name) and line[len(name) :].lstrip() == value for line in lines)


def calibration() -> CalibrationReport:
    score = Score(value=1, low=1, high=1)
    cost = {"perplexity": score, "perplexity_change": score, "kl_mean": 0, "kl_interval": score, "kl_p99": 0}
    sizes = dict.fromkeys(("bytes_before", "bytes_after", "peak_bytes", "peak_host_bytes"), 1)
    counts = dict.fromkeys(("quantized_layers", "verify_rows", "verify_tokens", "tokens_per_second", "seed"), 1)
    none: dict[str, Any] = {name: [] for name in ("skipped_layers", "checks", "layers", "block_seconds")}
    return CalibrationReport(
        model=PATH,
        device="CPU",
        engine="gptq",
        scheme={"group_size": 128, "activations": "none", "data_type": "int", "bits": 4},
        calibration=None,
        warnings=[f"{FOLDER}/rows.jsonl: 3 rows are cut"],
        perplexity_before=score,
        attempts=[Attempt(kept={}, weight_bytes=1, top1_agreement=1, **cost)],
        accepted=True,
        wall_seconds=1,
        versions={},
        result=PATH,
        **sizes,
        **counts,
        **none,
    )


def exported() -> ExportDocument:
    return ExportDocument(
        target="merged",
        path=PATH,
        run=PATH,
        passed=True,
        bytes=1,
        sha256={},
        base=Base(path="org/model"),
        merge_into=None,
        dtype="bfloat16",
        gate=Gate(passed=True, engine=None, rows=1, tokens=1, checks=[]),
        versions={},
        registered=Registered(name="m", version=3, registry=PATH),
        pushed=Pushed(repository="me/tiny", commit="c" * 40, url=f"https://hub/{'c' * 200}"),
    )


def test_the_report_says_where_the_result_is(lines: Show, columns: int) -> None:
    assert f"Written to {PATH}" in lines(report(result=PATH), render)
    advice = lines(report(advice=[f"Look at {FOLDER}: {'look there again ' * 30}"]), render)
    assert any(f"{FOLDER}:" in line for line in advice)
    assert max(len(line) for line in advice if "again" in line) <= columns


def test_a_calibration_says_where_the_result_is(lines: Show) -> None:
    shown = lines(calibration(), render_calibration)
    assert f"Written to {PATH}" in shown
    assert any(f"{FOLDER}/rows.jsonl:" in line for line in shown)


def test_an_export_says_what_to_run_next(lines: Show) -> None:
    shown = lines([exported()], render_exports)
    assert f"Written to {PATH}" in shown
    assert f"m v3 added to {PATH}; next: qft models promote m 3 --registry {quote(PATH)}" in shown
    assert f"Pushed to me/tiny: https://hub/{'c' * 200}" in shown


def test_a_source_is_whole_within_its_table(lines: Show) -> None:
    url = f"https://docs/{'c' * 100}"
    check = LoadCheck(target="merged", format="merged", loads=True, reasons=[], remedies=[], source=url)
    assert any(line.rstrip().endswith(url) for line in lines([check], render_loads))


def test_the_plan_tells_paths_whole(lines: Show) -> None:
    counts = dict.fromkeys(("parameters", "linear_parameters", "trainable_parameters", "hidden_size", "layers"), 2)
    model: dict[str, Any] = {
        "path": PATH,
        "commit": None,
        "dtype": "float32",
        "architecture": "Llama",
        "max_positions": 9,
        "heads": [],
    }
    device = {"kind": "cpu", "name": "CPU", "total_bytes": 1, "bf16": True, "tf32": False}
    plugin = {"path": PATH, "sha256": "0" * 64, "method": "mine"}
    training: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1.0,
    }
    training |= {"lr_scheduler_type": "b", "optim": "a", "bf16": False, "fp16": False, "gradient_checkpointing": False}
    plan = PlanDocument.model_validate(
        {
            "device": device,
            "model": model | counts,
            "quantization": {"scheme": "custom", "plugin": plugin},
            "adapter": None,
            "training": training,
            "steps": 1,
            "data": {"train_rows": 1, "eval_rows": 1, "sources": []},
        }
    )
    shown = lines(plan, render_plan)
    assert told("path", PATH, shown)
    assert told("quantizer", f"{PATH}, SHA-256 {'0' * 12}…", shown)
    data = {"audit": None, "verify_rows": 3, "warnings": [f"{FOLDER} is short"]}
    calibration = {"device": device, "model": model | counts, "engine": "rtn", "schemes": {}, "data": data}
    shown = lines(CalibrationCheck.model_validate({"calibration": calibration}), render_plan)
    assert told("model", f"{PATH}, 2 parameters, 2 blocks", shown)
    assert any(FOLDER in line for line in shown)


def test_the_registry_tells_paths_whole(lines: Show) -> None:
    entry: dict[str, Any] = {
        "name": "m" * 60,
        "entry": "v1",
        "current": None,
        "path": PATH,
        "manifest": MANIFEST,
        "history": [],
    }
    shown = lines(VersionDetails.model_validate(entry), render_version)
    assert f"{'m' * 60} v1" in shown
    assert told("base", PATH, shown)
    assert told("run", PATH, shown)
    assert told("data 1", f"{PATH} ({'0' * 12})", shown)
    empty = lines(RegistryListing(registry=PATH, models={}), render_list)
    assert f"{PATH}: no models; add one with qft models add" in empty
    changed = Difference(section="base", field="path", a=FOLDER, b="other")
    shown = lines(VersionComparison(name="m", a="v1", b="v2", rows=[changed]), render_diff)
    assert any(FOLDER in line for line in shown)


@pytest.mark.parametrize("terminal", [False, True])
def test_notes_are_as_they_are(columns: int, terminal: bool) -> None:
    console = Console(width=columns, file=io.StringIO(), force_terminal=terminal)
    with (LiveView if terminal else LineView)(console) as view:
        view.note(f"Loading {PATH}")
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert any(line.endswith(f"Loading {PATH}") for line in written.splitlines())


def test_what_to_run_instead_is_whole_in_an_error(columns: int, tmp_path: Path) -> None:
    refused = qft("models", "promote", "m", "x", "--registry", tmp_path)
    assert refused.exit_code == 2
    assert "x is no version; give a number, as `qft models list` shows them\n" in refused.stderr


def test_help_cuts_nothing(columns: int) -> None:
    told = qft("--help").stdout
    assert "--install-completion" in told
    assert "…" not in told
    assert "..." not in told.replace("[ARGS]...", "")
    assert "Hash every file, and name what is missing, changed or extra; exit code 4 if anything is." in " ".join(
        qft("models", "--help").stdout.split()
    )


def test_a_picture_of_the_report_is_as_wide_as_its_path(tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", report(result=PATH).model_dump(mode="json"))
    assert qft("report", tmp_path, "--svg", tmp_path / "report.svg").exit_code == 0
    assert PATH in unescape((tmp_path / "report.svg").read_text()).replace("\xa0", " ")
