"""Tiny models of several architectures, each written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.architectures import write_model
from tests.support.once import once


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of models, by the names of MODELS."""
    return lambda kind: once(tmp_path_factory, f"plan-{kind}", lambda folder: write_model(folder, kind))
