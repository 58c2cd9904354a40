"""Recipe files: what their text, their paths and what they extend mean, what is refused by its line, and the dump."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from qft.errors import MissingError, RecipeError
from qft.recipe import Recipe, Source, dump, load
from qft.recipe.source import MAX_BYTES, parse, read
from qft.recipe.source import write as write_yaml

MINIMAL = "model: {path: org/model}\ndata: {train: rows.jsonl}\noutput_dir: run\n"
FILE = Path("r.yaml")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test works in an empty folder, so that messages name its files as they are given."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def value(text: str) -> Any:
    return parse(f"value: {text}", "r.yaml").values["value"]


def write(text: str | bytes, path: Path = FILE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def recipe(text: str = MINIMAL, *overrides: str, path: Path = FILE) -> Recipe:
    return load(write(text, path), overrides).recipe


def problems(text: str | bytes, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(write(text), overrides)
    return caught.value.problems


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
    "text", ["12:30", "190:20:30", "2024-01-01", "2024-01-01T10:00:00Z", "010", "-010", "0x1f", "0b1", "1e", "1.2.3"]
)
def test_what_only_yaml_1_1_reads_as_a_number_or_a_date_is_a_string(text: str) -> None:
    assert value(text) == text


@pytest.mark.parametrize(
    ("text", "meant"),
    [("", None), ("~", None), ("null", None), ("Null", None), ("NULL", None), ("yes", True), ("Off", False)],
)
def test_nulls_and_booleans_are_those_of_yaml_1_1(text: str, meant: object) -> None:
    assert value(text) is meant


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
    tree = parse("a:\n  - &a {x: 1}\n  - y: 2\n    <<: *a\n", "r.yaml")
    assert [tree.at(("a", 1)), tree.at(("a", 1, "x"))] == ["r.yaml:3", "r.yaml:2"]


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


def test_all_duplicate_keys_are_reported() -> None:
    found = problems("a: 1\nb:\n  c: 1\n  c: 2\na: 3\nd: {<<: {x: 1}, <<: {x: 2}}\n")
    assert found == ["r.yaml:4: b.c: given twice", "r.yaml:5: a: given twice", "r.yaml:6: d.<<: given twice"]


@pytest.mark.parametrize("link", ["[{}]", "{{<<: [{}]}}"])
def test_an_alias_bomb_is_refused(link: str) -> None:
    text = "a: &a {x: 1}\n"
    for before, name in zip("abcdef", "bcdefg", strict=True):
        text += f"{name}: &{name} " + link.format(", ".join([f"*{before}"] * 10)) + "\n"
    assert "more than 20000 values" in problems(text)[0]


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "&a {<<: *a}", "a: &a {<<: *a}"])
def test_an_alias_that_contains_itself_is_refused(text: str) -> None:
    assert "contains itself" in problems(text)[0]


@pytest.mark.parametrize("text", ["a: " + "[" * 100_000, "a: " + "{a: " * 100_000, "a: " + "[" * 3000 + "]" * 3000])
def test_deep_nesting_is_refused(text: str) -> None:
    assert "nested too deeply" in problems(text)[0]


def test_only_a_file_of_up_to_a_mebibyte_is_read() -> None:
    path = write("a: 1\n#" + "x" * (MAX_BYTES - 6))
    assert path.stat().st_size == 2**20
    assert read(path).values == {"a": 1}
    assert "1048576 bytes" in problems("a: 1\n#" + "x" * (MAX_BYTES - 5))[0]


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
def test_tags_but_those_of_plain_values_are_refused_and_run_nothing(text: str) -> None:
    [problem] = problems("# first line\n" + text)
    assert problem.startswith("r.yaml:2: the tag ")
    assert "is not allowed" in problem
    assert not Path("ran").exists()


@pytest.mark.parametrize("text", ["!!int x", "!!int ''", "!!float x", "!!bool x", "9" * 5000])
def test_a_value_that_is_not_of_its_tag_is_refused(text: str) -> None:
    assert "r.yaml:2: cannot be read as" in problems(f"a: 1\nb: {text}")[0]


@pytest.mark.parametrize("escape", ["\\0", "\\ud800", "\\udfff"])
def test_an_escape_that_no_path_can_hold_is_refused(escape: str) -> None:
    assert problems(f'a: 1\nb: "x{escape}"')[0].startswith("r.yaml:2: holds a character")


def test_all_refused_values_are_reported_at_once() -> None:
    found = problems("a: !x 1\nb: {c: [1, !!bool x]}\n[d]: 1\n")
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
def test_what_is_no_mapping_in_utf_8_yaml_is_refused_by_line(text: str | bytes, start: str) -> None:
    [problem] = problems(text)
    assert problem.startswith(start)


def test_a_byte_order_mark_and_windows_line_ends_are_accepted() -> None:
    tree = read(write("\ufeffa: é\r\nb: 2\r\n"))
    assert tree.values == {"a": "é", "b": 2}
    assert tree.at(("b",)) == "r.yaml:2"


def test_a_missing_file_and_a_folder_are_missing(folder: Path) -> None:
    for path in (Path("none.yaml"), folder):
        with pytest.raises(MissingError, match=str(path)):
            read(path)


@pytest.mark.parametrize("path", ["org/name", "gpt2", "org/name-1.5_x", "package:llm/model.gguf"])
def test_hub_ids_and_package_files_stay_as_they_are(path: str) -> None:
    assert recipe(MINIMAL, f"model.path={path}").model.path == path


@pytest.mark.parametrize("path", ["m.gguf", "sub/m.GGUF", "./m", "../m", "a/b/c", "m.jsonl", "org/name"])
def test_local_paths_become_absolute_even_if_missing(path: str, folder: Path) -> None:
    (folder / "org/name").mkdir(parents=True)
    assert recipe(MINIMAL, f"model.path={path}").model.path == str((folder / path).resolve())


def test_a_tilde_is_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    write(MINIMAL, Path("home/base.yaml"))
    found = recipe("extends: ~/base.yaml\nmodel: {path: ~/m}\ndata: {train: [~/a.jsonl]}\noutput_dir: ~/run\n")
    assert [found.model.path, found.data.train[0].path, found.output_dir] == [
        str(folder / "home" / name) for name in ("m", "a.jsonl", "run")
    ]


@pytest.mark.parametrize("path", ["~nobody-of-this-name/m", "x" * 5000, "a/" * 3000])
def test_a_path_that_cannot_be_looked_up_breaks_nothing(path: str) -> None:
    assert recipe(MINIMAL, f"model.path={path}").model.path


def test_paths_of_a_file_are_relative_to_it_and_those_of_an_override_to_the_working_folder(folder: Path) -> None:
    text = """\
model: {path: ./m}
data:
  train: [a.jsonl, {path: b.jsonl, weight: 2}, org/rows]
  eval: {path: c.jsonl}
  chat_template: t.jinja
output_dir: run
"""
    found = recipe(text, path=Path("sub/r.yaml"))
    here = folder / "sub"
    assert [source.path for source in found.data.train] == [str(here / "a.jsonl"), str(here / "b.jsonl"), "org/rows"]
    assert [found.model.path, found.data.eval[0].path, found.data.chat_template, found.output_dir] == [
        str(here / name) for name in ("m", "c.jsonl", "t.jinja", "run")
    ]
    overrides = ["model.path=./m", "data.train=a.jsonl", "data.eval.path=c.jsonl", "output_dir=run"]
    found = recipe(text, *overrides, path=Path("sub/r.yaml"))
    assert found.data.train == (Source(path=str(folder / "a.jsonl")),)
    assert [found.model.path, found.data.eval[0].path, found.output_dir] == [
        str(folder / name) for name in ("m", "c.jsonl", "run")
    ]
    assert found.data.chat_template == str(here / "t.jinja")


def test_a_recipe_lies_over_the_one_it_extends_section_by_section(folder: Path) -> None:
    write(MINIMAL + "train: {max_steps: 1, report_to: [wandb, mlflow]}\nseed: 1\n", Path("base/base.yaml"))
    write("extends: base.yaml\ntrain: {max_steps: 2}\ndata: {eval: e.jsonl}\n", Path("base/middle.yaml"))
    found = recipe("extends: ../base/middle.yaml\ntrain: {report_to: [trackio]}\nseed: 2\n", path=Path("sub/r.yaml"))
    assert (found.train.max_steps, found.train.report_to, found.seed) == (2, ("trackio",), 2)
    assert found.data.train[0].path == str(folder / "base/rows.jsonl")
    assert found.data.eval[0].path == str(folder / "base/e.jsonl")
    assert found.output_dir == str(folder / "base/run")


def test_each_problem_names_the_file_that_it_was_written_in() -> None:
    base = "\nmodel: {path: org/model}\ntrain:\n  max_steps: a\n  warmup_steps: b\ndata: {train: [1, 2]}\nseed: c\n"
    write(base, Path("base/base.yaml"))
    text = "extends: base/base.yaml\ntrain: {warmup_steps: c}\ndata:\n  train:\n    - 3\n"
    assert [problem.rpartition(": ")[0] for problem in problems(text, "seed=d")] == [
        "--set seed: seed",
        "base/base.yaml:4: train.max_steps",
        "r.yaml:1: output_dir",
        "r.yaml:2: train.warmup_steps",
        "r.yaml:5: data.train.0",
    ]
    text = "extends: base/base.yaml\ndata: {train: {path: a.jsonl, fromat: text}}"
    assert "r.yaml:2: data.train.fromat: unknown field, did you mean format?" in problems(text)


@pytest.mark.parametrize("chain", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_a_loop_of_recipes_is_refused(chain: list[str]) -> None:
    for child, parent in itertools.pairwise([*chain, chain[0]]):
        write(f"extends: {parent}.yaml\n", Path(f"{child}.yaml"))
    [problem] = problems("extends: a.yaml\n")
    assert problem == "a.yaml:1: extends: a chain of recipes that never ends"


def test_a_recipe_that_is_not_there_is_missing() -> None:
    for path in (Path("none.yaml"), write("extends: none.yaml\n")):
        with pytest.raises(MissingError, match=r"none\.yaml: no such recipe"):
            load(path)


@pytest.mark.parametrize("parent", ["[a.yaml]", "", "3"])
def test_a_recipe_extends_one_path(parent: str) -> None:
    assert problems(f"{MINIMAL}extends: {parent}\n") == ["r.yaml:4: extends: the path of one recipe"]


@pytest.mark.parametrize(
    "text", ["1e5", "1E-4", "010", "12:30:00", "2024-01-01", "no", "~", "", "2_000", ".5", "<<", "=", "a: b", " a\nb "]
)
def test_written_strings_are_read_as_the_same_strings_here_and_elsewhere(text: str) -> None:
    written = write_yaml({"a": text, "b": [text]})
    assert parse(written, "r.yaml").values == yaml.safe_load(written) == {"a": text, "b": [text]}


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("train.learning_rate=1e-4", 1e-4), ("train.max_steps=2_000", 2000), ("train.run_name=010", "010"),
        ("train.run_name=12:30", "12:30"), ("train.run_name=a=b", "a=b"), ("train.run_name='3'", "3"),
        ("train.save_total_limit=", None), ("train.fp16=yes", True), ("train.report_to=[]", ()),
        ("adapter.target_modules=[q_proj, v_proj]", ("q_proj", "v_proj")), ("seed=7", 7),
    ],
)  # fmt: skip
def test_an_override_is_typed_like_yaml(change: str, value: object) -> None:
    found: Any = recipe(MINIMAL, change)
    for name in change.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["quant.mode=8bit", "quant.threshold=5", "quant.skip_modules=[a]"],
        ["quant.preset=finetune", "train.max_steps=3"],
        ["quant.preset=inference", "quant.double_quant=true"],
        ["adapter.kind=none", "train.num_train_epochs=2", "train.save_strategy='no'"],
        ["data.train=[{path: a.csv, weight: 0.5, format: text}, org/rows]", "data.eval=e.jsonl", "eval.samples=9",
         "eval.metrics=[exact_match]", "train.eval_strategy=steps", "train.eval_steps=4"],
        ["train.run_name='1e-4'", "model.revision='123e4'", "adapter.target_modules='.*_proj'"],
        ["output_dir='é: #1'", "train.learning_rate=1e-12", "train.report_to=[]", "adapter.target_modules=[a, '010']"],
    ],
)  # fmt: skip
def test_a_dump_loads_to_the_same_recipe(changes: list[str]) -> None:
    """The same but for the preset, whose values are written out."""
    first = recipe(MINIMAL, *changes)
    second = recipe(dump(first), path=Path("elsewhere/r.yaml"))
    quant = first.quant.model_copy(update={"preset": None})
    assert second == first.model_copy(update={"quant": quant})
    assert dump(second) == dump(first)


def test_a_dump_holds_the_defaults_that_are_read_and_no_quantization_that_is_none() -> None:
    again = load(write(dump(recipe())))
    assert again.given("adapter.r")
    assert again.given("train.optim")
    assert not again.given("eval.samples")
    assert not again.given("quant.mode")
