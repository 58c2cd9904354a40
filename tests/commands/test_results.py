"""What `qft eval` and `qft report --svg` may replace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qft.commands.evaluate import EvalOptions, evaluate
from qft.commands.results import answer_files, require_replaceable
from qft.errors import BusyError, RecipeError, RunError
from qft.progress import View
from qft.run.lock import locked
from qft.views.marks import write_picture
from tests.support.cli import qft
from tests.support.rows import chat, write_jsonl

SVG = '<svg class="rich-terminal"><text>tables</text></svg>'


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", [chat(f"say {i}", f"it is {i}") for i in range(4)])


def asked(model: Path, rows: Path, out: Path) -> None:
    evaluate([str(model)], EvalOptions(data=str(rows), out=out, metrics=("exact_match",)), View())


def test_its_own_results_are_replaced(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked(tiny_model, rows, out)
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    assert len(names) == 4
    (out / "eval.json").write_text((out / "eval.json").read_text().replace('"rows": 4', '"rows": 5'))
    asked(tiny_model, rows, out)
    assert json.loads((out / "eval.json").read_text())["rows"] == 4
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == names


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("eval.json", "{}"), ("eval.json", '{"kind": "report"}'), ("eval.json", "[1"), ("report.html", "<html></html>"),
        ("answers/{}", '{"prompt": "mine", "given": "also"}\n'), ("answers/{}", "mine"),
    ],
)  # fmt: skip
def test_files_of_others_are_left_alone(name: str, text: str, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = out / name.format(answer_files(out, [str(tiny_model)])[str(tiny_model)].name)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(RunError, match="is not from `qft eval`") as caught:
        asked(tiny_model, rows, out)
    assert str(path) in str(caught.value)
    assert [file.read_text() for file in out.rglob("*") if file.is_file()] == [text]


def test_a_page_from_before_there_was_a_mark_is_known(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text('<body>\n<a class="skip" href="#main">Skip to the figures</a>')
    require_replaceable(tmp_path, ["model"], None)


def test_rows_are_not_replaced_by_the_answers_to_them(tmp_path: Path) -> None:
    file = answer_files(tmp_path, ["model"])["model"]
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(RecipeError, match="is where the answers are written"):
        require_replaceable(tmp_path, ["model"], str(tmp_path / "link" / "answers" / file.name))


def test_a_run_keeps_its_own_report(tmp_path: Path) -> None:
    manifest = {"kind": "run", "command": [], "status": "complete", "started": "2026", "versions": {"qft": "1"}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="is a run, whose own report is there"):
        require_replaceable(tmp_path, ["model"], None)


def test_one_evaluation_at_a_time_in_a_folder(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "out", "qft eval"), pytest.raises(BusyError):
        asked(tiny_model, rows, tmp_path / "out")


def test_each_target_has_a_file_of_answers_with_a_name_that_can_be(tmp_path: Path) -> None:
    names = ["runs/one", "runs_one", "runs/" + "ä" * 300, "runs/" + "ä" * 299 + "b", "plain"]
    files = answer_files(tmp_path, names)
    assert len({*files.values()}) == len(names)
    assert files["plain"].name == "plain.jsonl"
    for path in files.values():
        path.parent.mkdir(exist_ok=True)
        path.touch()


def test_only_a_picture_of_a_report_is_replaced_by_one(tmp_path: Path) -> None:
    path = tmp_path / "report.svg"
    write_picture(path, SVG)
    first = path.read_text()
    assert first.startswith('<svg class="rich-terminal"><!-- qft report --><text>')
    write_picture(path, SVG.replace("tables", "others"))
    assert path.read_text() == first.replace("tables", "others")
    path.write_text('<text y="27">qft&#160;report&#160;quickstart</text>')  # as it was before there was a mark
    write_picture(path, SVG)
    for text in ("<svg></svg>", "mine", "\x00"):
        path.write_text(text)
        with pytest.raises(RunError, match="no picture of `qft report`"):
            write_picture(path, SVG)
        assert path.read_text() == text
    path.unlink()
    path.mkdir()
    with pytest.raises(RunError):
        write_picture(path, SVG)


def test_a_results_folder_that_is_a_file_is_told(tiny_model: Path, rows: Path) -> None:
    told = qft("eval", tiny_model, "--data", rows, "--out", rows)
    assert told.exit_code == 7
    assert "a folder" in told.stderr
