"""Kernels on this machine, whatever it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qft.kernels.buffers import SCRATCH
from tests.support.kernels import everywhere


@pytest.fixture(autouse=True)
def on_this_machine() -> Iterator[None]:
    with everywhere():
        yield
    SCRATCH.clear()
