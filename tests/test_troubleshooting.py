"""docs/troubleshooting.md beside the code: exit codes that there are, and messages that are said, with those codes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from qft import errors
from tests.support.paths import ROOT

PAGE = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
CODES = {
    name: kind.exit_code
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.QftError) and isinstance(kind.exit_code, int)
}
"""Class -> exit code."""
INTERRUPTED = {75, 128 + 2, 128 + 15, 128 + 1}


def sections() -> Iterator[tuple[list[int], str]]:
    """The codes of each heading, and what stands below it."""
    for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        head, _, text = part.partition("\n")
        yield [int(code) for code in re.findall(r"\d+", head.partition(":")[0])], text


MESSAGES = [
    (codes[0], message)
    for codes, text in sections()
    for message in re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)
]


def said(node: ast.AST) -> str | None:
    """What a literal says, with `…` for what is put in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def texts() -> Iterator[tuple[str, str | None]]:
    """Each text in the code, and the class of the error that is made of it, where that stands around it."""
    for path in sorted((ROOT / "qft").rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        raised = {
            id(inner): node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CODES
            for inner in ast.walk(node)
        }
        yield from ((text, raised.get(id(node))) for node in ast.walk(tree) if (text := said(node)))


@pytest.fixture(scope="module")
def spoken() -> list[tuple[str, str | None]]:
    return list(texts())


def test_each_exit_code_has_its_place() -> None:
    told = [code for codes, _ in sections() for code in codes]
    assert sorted(told) == sorted({*CODES.values(), *INTERRUPTED})


@pytest.mark.parametrize(("code", "message"), MESSAGES, ids=[message for _, message in MESSAGES])
def test_a_message_is_said_with_its_code(code: int, message: str, spoken: list[tuple[str, str | None]]) -> None:
    wanted = re.compile(".*".join(map(re.escape, message.strip("… ").split("…"))), re.DOTALL)
    found = [kind for text, kind in spoken if wanted.search(text)]
    assert found, "the code says no such thing"
    kinds = {CODES[kind] for kind in found if kind}
    assert not kinds or code in kinds


def test_the_readme_names_the_same_codes() -> None:
    told = (ROOT / "README.md").read_text("utf-8").partition("## Exit codes\n\n")[2].partition("\n\n")[0]
    codes = {int(code) for code in re.findall(r"\b\d+\b", told)}
    assert codes - {128, 130} == {*CODES.values(), 75} - {1}
