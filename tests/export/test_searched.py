"""compressed-tensors of a run whose recipe says nothing of it: searched with its own rows, or rounded and so told."""

from __future__ import annotations

import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from qft.documents.export import ExportDocument
from qft.export import export
from qft.model.handover import FORMS
from qft.progress import View
from qft.views.terminal.export import render_exports
from tests.support.exports import job_of, options


def exported(run: Path, out: Path) -> ExportDocument:
    [document] = export(run, options("compressed-tensors", out=out), View())
    return document


def told(document: ExportDocument) -> tuple[str, str]:
    """By terminal and card."""
    console = Console(width=1000, file=StringIO(), record=True)
    console.print(render_exports([document]))
    return console.export_text(), (Path(document.path) / "README.md").read_text("utf-8")


def test_weights_are_searched_with_the_runs_own_rows(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("auto_round", reason="needs auto-round (pip install 'qft[calibrate]')")
    document = exported(run, tmp_path)
    assert document.passed
    assert document.quantization is not None
    assert document.quantization["engine"] == "autoround"
    assert "not_searched" not in document.quantization
    search = job_of(run).search(FORMS["compressed-tensors"])
    assert search is not None
    assert search.max_length == 128  # of the run's rows: what its model has positions for
    terminal, card = told(document)
    assert "quantizing the merged model again (autoround) cost" in terminal
    assert "quantized again (autoround, " in card


def test_without_auto_round_they_are_rounded_and_that_is_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "auto_round", None)
    document = exported(run, tmp_path)
    assert document.passed
    assert document.quantization is not None
    assert document.quantization["engine"] == "rtn"
    assert "needs auto-round; pip install 'qft[calibrate]'" in document.quantization["not_searched"]
    terminal, card = told(document)
    assert "again (rtn, since autoround: " in terminal
    assert "quantized again (rtn, since autoround could not search, " in card
