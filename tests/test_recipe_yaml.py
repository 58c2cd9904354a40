"""YAML text -> plain values with their lines; whatever is no plain value is refused by file and line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from qft.errors import MissingError, RecipeError
from qft.recipe.source import MAX_BYTES, parse, read, write


def value(text: str) -> Any:
    return parse(f"value: {text}", "r.yaml").values["value"]


def problems(text: str | bytes, folder: Path) -> list[str]:
    """The problems of a recipe file, named as seen from its folder."""
    path = folder / "r.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(RecipeError) as caught:
        read(path)
    return [problem.replace(str(path), "r.yaml") for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", 7), ("-3", -3), ("0", 0), ("2_000", 2000), ("1e-4", 1e-4), ("1E5", 1e5), ("-2.5e+3", -2500.0),
        (".5", 0.5), ("1.", 1.0), ("1_000.5", 1000.5), (".inf", math.inf), ("!!float 3", 3.0), ("!!int 0x10", 16),
    ],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(text: str, number: float) -> None:
    assert value(text) == number
    assert type(value(text)) is type(number)


@pytest.mark.parametrize(
    "text", ["12:30", "190:20:30", "2024-01-01", "2024-01-01T10:00:00Z", "010", "-010", "0x1f", "0b1", "1e", "1.2.3", "_1"]
)
def test_what_only_yaml_1_1_reads_as_a_number_or_a_date_is_a_string(text: str) -> None:
    assert value(text) == text


@pytest.mark.parametrize(
    ("text", "meant"),
    [("", None), ("~", None), ("null", None), ("Null", None), ("NULL", None), ("yes", True), ("off", False), ("y", "y")],
)
def test_nulls_and_booleans_are_those_of_yaml_1_1(text: str, meant: object) -> None:
    assert value(text) is meant or value(text) == meant == text


@pytest.mark.parametrize("text", ["'1e-4'", '"3"', "!!str 3", "'no'", "'~'"])
def test_quotes_make_a_string(text: str) -> None:
    assert value(text) == text.removeprefix("!!str ").strip("'\"")


def test_anchors_and_merge_keys_work_and_own_fields_win() -> None:
    tree = parse("a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc:\n  z: 3\n  <<: [*a, *b]\nd: *a\ne: {<<: *b}\n", "r.yaml")
    assert tree.values["c"] == {"x": 1, "y": 1, "z": 3}
    assert tree.values["d"] == {"x": 1, "y": 1}
    assert tree.values["e"] == {"y": 2, "z": 2}
    assert [tree.at(("c", name)) for name in "xyz"] == ["r.yaml:1", "r.yaml:1", "r.yaml:4"]
    assert tree.at(("c",)) == "r.yaml:3"


@pytest.mark.parametrize("text", ["a: {<<: 5}", "a: {<<: }", "a: {<<: [1]}"])
def test_a_merge_key_takes_only_mappings(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^r\.yaml:1: << takes a mapping"):
        parse(text, "r.yaml")


def test_each_value_knows_its_line_and_an_unknown_one_that_around_it() -> None:
    tree = parse("a:\n  b:\n    - 1\n    - c: 2\n", "r.yaml")
    assert [tree.at(place) for place in [("a",), ("a", "b"), ("a", "b", 0), ("a", "b", 1, "c")]] == [
        "r.yaml:1", "r.yaml:2", "r.yaml:3", "r.yaml:4",
    ]  # fmt: skip
    assert tree.at(("a", "b", 1, "nothing")) == "r.yaml:4"


def test_all_duplicate_keys_are_reported(tmp_path: Path) -> None:
    text = "a: 1\nb:\n  c: 1\n  c: 2\na: 3\nd: {<<: {x: 1}, <<: {x: 2}}\n"
    assert problems(text, tmp_path) == ["r.yaml:4: b.c: given twice", "r.yaml:5: a: given twice",
                                        "r.yaml:6: d.<<: given twice"]  # fmt: skip


@pytest.mark.parametrize("link", ["[{}]", "{{<<: [{}]}}"])
def test_an_alias_bomb_is_refused(link: str, tmp_path: Path) -> None:
    text = "a: &a {x: 1}\n"
    for before, name in zip("abcdef", "bcdefg", strict=True):
        text += f"{name}: &{name} " + link.format(", ".join([f"*{before}"] * 10)) + "\n"
    assert "more than 20000 values" in problems(text, tmp_path)[0]


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "&a {<<: *a}", "a: &a {<<: *a}"])
def test_an_alias_that_contains_itself_is_refused(text: str, tmp_path: Path) -> None:
    assert "contains itself" in problems(text, tmp_path)[0]


@pytest.mark.parametrize("text", ["a: " + "[" * 100_000, "a: " + "{a: " * 100_000, "a: " + "[" * 3000 + "]" * 3000])
def test_deep_nesting_is_refused(text: str, tmp_path: Path) -> None:
    assert "nested too deeply" in problems(text, tmp_path)[0]


def test_only_a_file_of_up_to_a_mebibyte_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: 1\n#" + "x" * (MAX_BYTES - 6))
    assert path.stat().st_size == 2**20
    assert read(path).values == {"a": 1}
    assert "1048576 bytes" in problems("a: 1\n#" + "x" * (MAX_BYTES - 5), tmp_path)[0]


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system 'touch ran'",
        "a: !!python/object/apply:os.system ['touch ran']",
        "a: !!python/object/apply:os.system {args: ['touch ran']}",
        "!!python/object/apply:os.system {a: 'touch ran'}",
        "!!python/object/apply:os.system 'touch ran': 1",
        "a: !!python/name:os.system",
        # Their last part is the name of a plain type.
        "a: !!python/object/apply:str ['touch ran']",
        "a: !!python/name:str ''",
        "a: !!python/object:int {}",
        "a: !custom 3", "a: !custom [3]", "a: !custom {b: 3}", "!custom a: 3", "a: !<int> 3",
        "a: !!binary aGk=", "a: !!timestamp 2024-01-01", "a: !!set {b}", "a: !!omap [b: 1]",
        # Plain tags on another kind of node.
        "a: !!map b", "a: !!seq b", "a: !!str [b]", "a: !!int {b: 1}",
    ],
)  # fmt: skip
def test_every_tag_but_those_of_plain_values_is_refused_and_nothing_runs(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    [problem] = problems("# first line\n" + text, tmp_path)
    assert problem.startswith("r.yaml:2: the tag ")
    assert "is not allowed" in problem
    assert not Path("ran").exists()


@pytest.mark.parametrize("text", ["!!int x", "!!int ''", "!!float x", "!!bool x", "9" * 5000])
def test_a_value_that_is_not_of_its_tag_is_refused(text: str, tmp_path: Path) -> None:
    assert "r.yaml:2: cannot be read as" in problems(f"a: 1\nb: {text}", tmp_path)[0]


@pytest.mark.parametrize("escape", ["\\0", "\\ud800", "\\udfff"])
def test_an_escape_that_no_path_can_hold_is_refused(escape: str, tmp_path: Path) -> None:
    assert problems(f'a: 1\nb: "x{escape}"', tmp_path)[0].startswith("r.yaml:2: holds a character")


def test_all_refused_values_are_reported_at_once(tmp_path: Path) -> None:
    found = problems("a: !x 1\nb: {c: [1, !!bool x]}\n[d]: 1\n", tmp_path)
    assert [problem[:9] for problem in found] == ["r.yaml:1:", "r.yaml:2:", "r.yaml:3:"]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("a: 1\nb: [1\nc: 2\n", "r.yaml:3: not valid YAML: "),
        ("a:\n\t- b\n", "r.yaml:2: not valid YAML: "),
        ("a: 1\n\nb: *nowhere\n", "r.yaml:3: not valid YAML: found undefined alias"),
        ("a: b: c\n", "r.yaml:1: not valid YAML: "),
        ("a: 'open\n", "r.yaml:2: not valid YAML: "),
        ("a: 1\nb: \x01\n", "r.yaml:2: not valid YAML: the character U+0001"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: not valid YAML: expected a single document"),
        (b"a: 1\nb: \xff\n", "r.yaml:2: not UTF-8"),
        ("a: 1\n".encode("utf-16"), "r.yaml:1: not UTF-8"),
        ("", "r.yaml: empty"),
        ("# only a comment\n", "r.yaml: empty"),
        ("\n- a\n- b\n", "r.yaml:2: a recipe is a mapping"),
        ("text\n", "r.yaml:1: a recipe is a mapping"),
    ],
)
def test_what_is_no_mapping_in_utf_8_yaml_is_refused_by_line(text: str | bytes, start: str, tmp_path: Path) -> None:
    [problem] = problems(text, tmp_path)
    assert problem.startswith(start)


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes("\ufeffa: é\r\nb: 2\r\n".encode())
    assert read(path).values == {"a": "é", "b": 2}
    assert read(path).at(("b",)) == f"{path}:2"


def test_a_missing_file_and_a_folder_are_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(MissingError, match=str(path)):
            read(path)


@pytest.mark.parametrize(
    "text", ["1e5", "1E-4", "010", "12:30", "2024-01-01", "no", "~", "", "2_000", ".5", "<<", "=", "a: b", " a\nb ", "é😀"]
)
def test_written_strings_are_read_as_the_same_strings(text: str) -> None:
    assert parse(write({"a": text, "b": [text]}), "r.yaml").values == {"a": text, "b": [text]}
