"""The run that the tests of this room hand over."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.once import once
from tests.support.runs import trained


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """An adapter on an nf4 base that computes in bfloat16; not to be written into."""
    return once(tmp_path_factory, "trained", lambda folder: trained(folder, tiny_model)) / "run"
