"""`qft`, called in this process."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner, Result

from qft.cli import app


def qft(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
