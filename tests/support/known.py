"""Figures that a document may leave out."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def known(value: T | None) -> T:
    """A figure that is there."""
    assert value is not None
    return value
