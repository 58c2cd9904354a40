"""Nobody waits until a server can be asked again."""

from __future__ import annotations

import pytest

from qft.serving import reach


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "PAUSES", (0.0, 0.0))
