"""What tests of translations share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A data set as LLaMA-Factory's `data` folder has it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"mine": {"file_name": "mine.jsonl"}}')
    row = '{"instruction": "a", "input": "", "output": "b"}\n'
    (tmp_path / "data" / "mine.jsonl").write_text(4 * row)
    return tmp_path
