"""The files of a run beside their hashes."""

from rich.console import Group

from qft.documents.verification import RunVerification
from qft.views.terminal.table import Rows, spaced


def render_verification(document: RunVerification) -> Group:
    """One line for each file; what is wrong is the error."""
    rows = Rows(document.run, "file", "", unbroken=True)
    for each in document.files:
        rows.add(each.file, each.verdict, style="" if each.verdict == "whole" else "bold")
    past = Rows("Accepted", "time", "files")
    for acceptance in document.accepted:
        past.add(acceptance.time, ", ".join(acceptance.files))
    return spaced(rows, *([past] if document.accepted else []))
