"""`qft`, called in this process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from qft.cli import app

make_once = functools.cache(typer.main.get_command)
"""Typer makes the commands anew for each call, which takes as long as some of them."""


def qft(*arguments: Any) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.testing._get_command", make_once)
        return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
