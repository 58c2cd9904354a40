"""Exports of a run, and why they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qft.errors import QftError
from qft.export import ExportOptions, export
from qft.export.job import Job, find_job, load_run
from qft.progress import View


def options(*to: str, **more: Any) -> ExportOptions:
    return ExportOptions(to=to, **more)


def job_of(run: Path, **more: Any) -> Job:
    return find_job(run, load_run(run, ()), ExportOptions(**more), View())


def refusal(run: Path, *to: str, **more: Any) -> QftError:
    with pytest.raises(QftError) as caught:
        export(run, options(*to, **more), View())
    return caught.value
