"""The run that the tests of this room hand over, and what is known of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qft.export.gate.verify import Reference, reference
from qft.export.job import Job
from tests.support.exports import job_of
from tests.support.once import once
from tests.support.runs import trained


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """An adapter on an nf4 base that computes in bfloat16; not to be written into."""
    return once(tmp_path_factory, "trained", lambda folder: trained(folder, tiny_model)) / "run"


@pytest.fixture(scope="module")
def asked(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Job, Reference]]:
    """That run as an export's job, and what the gate compares with."""
    job = job_of(run)
    with reference(job, tmp_path_factory.mktemp("scratch")) as expected:
        yield job, expected
