"""Calibration windows and verification rows: what is drawn, what is kept apart, and what is said about it."""

from __future__ import annotations

import hashlib
import json
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qft.data.calibration import FEW, CalibrationData, calibration_data
from qft.data.prepare import Prepared, prepare
from qft.documents.plan import Audit
from qft.errors import DataError
from qft.recipe import Recipe
from tests.support.models import byte_tokenizer
from tests.support.rows import chat, write_jsonl


def recipe(train: Any = (), seed: int = 0, calibrate: dict[str, Any] | None = None, **data: Any) -> Recipe:
    settings = {"samples": 4, "max_length": 64, "verify_samples": 2, **(calibrate or {})}
    rows = {"train": train, "max_length": 2048, **data}
    values = {"model": {"path": "none"}, "data": rows, "output_dir": "none", "seed": seed}
    return Recipe.model_validate({**values, "calibrate": settings})


def drawn(*args: Any, needs_windows: bool = True, tokenizer: Any = None, **settings: Any) -> CalibrationData:
    return calibration_data(recipe(*args, **settings), tokenizer or byte_tokenizer(), needs_windows=needs_windows)


def trained_on(*args: Any, **settings: Any) -> Prepared:
    asked = recipe(*args, **settings)
    return prepare(asked.data, byte_tokenizer(), asked.seed)


def audit(data: CalibrationData) -> Audit:
    assert data.audit is not None
    return data.audit


def text(data: CalibrationData) -> str:
    return str(byte_tokenizer().decode(list(chain.from_iterable(data.windows))))


def chats(path: Path, count: int, answer: str = "it is") -> str:
    return str(write_jsonl(path, [chat(f"{path.stem} {i}", f"{answer} {i}") for i in range(count)]))


def lines(path: Path, *texts: str) -> str:
    path.write_text("".join(f"{line}\n" for line in texts), "utf-8")
    return str(path)


def letters(path: Path, letter: str, count: int, length: int = 9) -> str:
    """Rows of one letter and a number: `length` tokens and an end token each."""
    return lines(path, *(f"{letter * (length - 4)}{i:04d}" for i in range(count)))


@pytest.fixture
def many(tmp_path: Path) -> str:
    return chats(tmp_path / "many.jsonl", 60)


def test_windows_are_joined_rows_as_the_chat_template_renders_them(many: str) -> None:
    data = drawn(many)
    assert [len(window) for window in data.windows] == [64] * 4
    joined = list(chain.from_iterable(data.windows))
    start = byte_tokenizer()("<|im_start|>user").input_ids
    starts = [i for i in range(len(joined)) if joined[i : i + len(start)] == start]
    whole = [tuple(joined[a:b]) for a, b in pairwise(starts)]
    train = data.prepared.train
    rendered = {tuple(ids): row for ids, row in zip(train["input_ids"], train["row"], strict=True)}
    assert starts[0] == 0
    assert len(whole) >= 4
    assert set(whole) <= set(rendered)
    assert [rendered[ids] for ids in whole] != sorted(rendered[ids] for ids in whole)


def test_one_line_a_window_is_json(many: str) -> None:
    data = drawn(many)
    assert [json.loads(line) for line in data.as_jsonl().splitlines()] == [
        {"window": i, "input_ids": list(window)} for i, window in enumerate(data.windows)
    ]


def test_a_seed_draws_the_same_in_any_number_of_processes_and_another_seed_draws_differently(many: str) -> None:
    first, again, parallel, other = drawn(many), drawn(many), drawn(many, num_proc=2), drawn(many, seed=1)
    for same in (again, parallel):
        assert same.windows == first.windows
        assert same.audit == first.audit
        assert same.verify.to_list() == first.verify.to_list()
    assert sorted(other.windows) != sorted(first.windows)
    assert other.verify["row"] != first.verify["row"]
    assert audit(other).sha256 != audit(first).sha256


def test_the_section_has_a_seed_of_its_own_which_leaves_the_split_as_in_the_training(many: str) -> None:
    settings: dict[str, Any] = {"eval_fraction": 0.2, "calibrate": {"seed": 7}}
    given = drawn(many, **settings)
    assert drawn(many, seed=7, calibrate={"seed": None}).windows == drawn(many, calibrate={"seed": 7}).windows
    assert given.windows != drawn(many, eval_fraction=0.2).windows
    trained = trained_on(many, **settings)
    assert given.prepared.train.to_list() == trained.train.to_list()
    assert given.prepared.eval is not None
    assert trained.eval is not None
    assert given.prepared.eval.to_list() == trained.eval.to_list()


@pytest.mark.parametrize("held_out", ["file", "fraction"])
def test_held_out_rows_verify_in_the_order_of_their_file(tmp_path: Path, many: str, held_out: str) -> None:
    settings = {"eval": chats(tmp_path / "eval.jsonl", 20)} if held_out == "file" else {"eval_fraction": 0.3}
    data = drawn(many, calibrate={"verify_samples": 5}, **settings)
    assert data.prepared.eval is not None
    rows = list(data.verify["row"])
    assert len(rows) == 5
    assert rows == sorted(rows)
    assert rows != list(data.prepared.eval["row"])[:5]
    held = data.prepared.eval.to_list()
    assert all(row in held for row in data.verify)
    place = data.prepared.place(data.verify[0]["source"], rows[0])
    assert place == f"{tmp_path / 'eval.jsonl' if held_out == 'file' else many}:{rows[0] + 1}"
    assert len(drawn(many, calibrate={"verify_samples": 99}, **settings).verify) == (20 if held_out == "file" else 18)


def test_without_held_out_rows_some_of_the_calibrations_verify_and_calibrate_nothing(many: str) -> None:
    data = drawn(many, calibrate={"verify_samples": 8, "samples": 999})
    assert len(data.verify) == 8
    assert set(data.verify.column_names) == set(data.prepared.train.column_names)
    assert all(supervised > 0 for supervised in data.verify["supervised"])
    assert audit(data).rows == 52
    assert list(data.verify["row"]) == sorted(data.verify["row"])
    tokenizer = byte_tokenizer()
    assert not [ids for ids in data.verify["input_ids"] if tokenizer.decode(ids) in text(data)]


@pytest.mark.parametrize("samples", [1, 3, 64])
def test_copies_of_a_row_are_on_one_side_only(tmp_path: Path, samples: int) -> None:
    rows = [f"row number {i}" for i in range(8)]
    data = drawn(lines(tmp_path / "a.txt", *rows * 5), calibrate={"verify_samples": samples, "samples": 99})
    verified = {byte_tokenizer().decode(ids) for ids in data.verify["input_ids"]}
    assert len(verified) == len(data.verify) == min(samples, 4)
    assert not [row for row in verified if row in text(data)]
    assert audit(data).rows == (8 - len(verified)) * 5


def test_a_calibration_row_that_equals_a_held_out_row_is_left_out_and_told(tmp_path: Path) -> None:
    rows = [f"row number {i}" for i in range(40)]
    train, held_out = lines(tmp_path / "a.txt", *rows), lines(tmp_path / "b.txt", *rows[:3])
    data = drawn(train, eval=held_out, calibrate={"verify_samples": 9, "samples": 99})
    assert audit(data).rows == 37
    assert "3 of 40 calibration rows equal a held-out row and are left out" in data.warnings
    with pytest.raises(DataError, match="every calibration row is among the held-out rows"):
        drawn(train, eval=train, calibrate={"verify_samples": 40})


def test_one_row_cannot_do_both(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.txt", "the same " * 20, "the same " * 20)
    with pytest.raises(DataError, match="one distinct row"):
        drawn(path)
    assert len(drawn(path, needs_windows=False).verify) == 1


def test_without_need_of_windows_there_are_rows_to_verify_on_alone(many: str) -> None:
    data = drawn(many, needs_windows=False, calibrate={"verify_samples": 60})
    assert (data.windows, data.audit, data.as_jsonl(), data.warnings) == ((), None, "", ())
    assert len(data.verify) == 60


@pytest.mark.parametrize(("weights", "shares"), [((1, 1), (30, 10)), ((1, 3), (20, 20)), ((0.5, 1), (24, 16))])
def test_sources_are_drawn_by_their_weighted_rows(
    tmp_path: Path, weights: tuple[float, float], shares: tuple[int, int]
) -> None:
    paths = [letters(tmp_path / "a.txt", "a", 300), letters(tmp_path / "b.txt", "b", 100)]
    sources = [{"path": path, "weight": float(weight)} for path, weight in zip(paths, weights, strict=True)]
    held_out = letters(tmp_path / "c.txt", "c", 20)
    data = drawn(calibrate={"data": sources, "samples": 4, "max_length": 100}, eval=held_out)
    found = audit(data)
    assert found.rows == 40
    assert list(found.by_source) == paths
    assert list(found.by_source.values()) == pytest.approx(shares, abs=1)
    assert found.duplicate_rows == 0
    assert (text(data).count("aaaa"), text(data).count("bbbb")) == tuple(found.by_source.values())


def test_a_small_source_is_there_beside_a_large_one(tmp_path: Path) -> None:
    sources = [letters(tmp_path / "a.txt", "a", 900), letters(tmp_path / "b.txt", "b", 2)]
    held_out = letters(tmp_path / "c.txt", "c", 2)
    all_drawn = [drawn(sources, eval=held_out, seed=seed) for seed in range(3)]
    assert [audit(data).by_source[sources[1]] for data in all_drawn] == [1, 1, 1]
    assert len({text(data).find("bbbb") for data in all_drawn}) > 1


@pytest.mark.parametrize("seed", range(6))
def test_rows_of_all_lengths_are_drawn_evenly(tmp_path: Path, seed: int) -> None:
    lengths = np.random.default_rng(0).permutation([*range(20, 120), *range(900, 1000)])
    path = lines(tmp_path / "a.txt", *("x" * n for n in lengths))
    found = audit(drawn(path, seed=seed, calibrate={"samples": 16, "max_length": 1000}, max_length=2000))
    # One row a round from each eighth of the lengths, which is 25 tokens wide.
    assert found.row_length_p5 <= 45
    assert found.row_length_p95 > 975
    # A round holds as many tokens as the mean says; only the last is cut short.
    assert found.rows == pytest.approx(16000 / lengths.mean(), abs=4)


def test_rows_that_repeat_wait_until_all_have_been_drawn(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.txt", *["the same"] * 500, *(f"number {i}" for i in range(40)))
    found = audit(drawn(path, calibrate={"samples": 4, "max_length": 60}))
    assert found.rows > 20
    assert found.duplicate_rows == 0


def test_calibration_rows_of_their_own_are_read_as_the_data_section_says(tmp_path: Path) -> None:
    train = chats(tmp_path / "train.jsonl", 5)
    own = tmp_path / "own.jsonl"
    rows = [{"messages": []}, *({**chat(f"own {i}", "yes"), "text": f"plain text {i}"} for i in range(40))]
    write_jsonl(own, rows)
    with pytest.raises(DataError, match=r"own\.jsonl:1: messages"):
        drawn(train, calibrate={"data": str(own)}, format="messages")
    settings: dict[str, Any] = {"calibrate": {"data": str(own)}, "on_bad_row": "skip"}
    chatty = drawn(train, **settings, format="messages")
    assert "assistant\nyes<|im_end|>" in text(chatty)
    assert "train" not in text(chatty)
    assert audit(chatty).by_source.keys() == {str(own)}
    assert "plain text" in text(drawn(train, **settings, format="text"))
    supervised = drawn(train, **settings, format="messages", loss_on="all").verify["supervised"]
    assert max(chatty.verify["supervised"]) == 4 < min(supervised)
    shouting = "{% for m in messages %}!{{ m['content'] }}<|im_end|>{% endfor %}"
    assert "assistant" not in text(drawn(train, **settings, format="messages", tokenizer=byte_tokenizer(shouting)))


def test_an_empty_set_is_refused_by_its_name(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"messages": []}]))
    settings: dict[str, Any] = {"format": "messages", "on_bad_row": "skip"}
    with pytest.raises(DataError, match=r"^calibrate\.data: no row is left"):
        drawn(calibrate={"data": path}, **settings)
    with pytest.raises(DataError, match=r"^data\.train: no row is left"):
        drawn(path, **settings)


@pytest.mark.parametrize("own", [True, False])
def test_a_long_row_is_cut_for_the_windows_alone(tmp_path: Path, own: bool) -> None:
    questions = [*(f"{i} " * 60 for i in range(10, 30)), *(f"short {i}" for i in range(4))]
    path = str(write_jsonl(tmp_path / "a.jsonl", [chat(question, "the answer") for question in questions]))
    calibrate = {"verify_samples": 12, "samples": 99} | ({"data": path} if own else {})
    settings: dict[str, Any] = {"calibrate": calibrate, "train": () if own else path}
    data = drawn(**settings, max_length=512)
    found = audit(data)
    assert found.row_length_p95 == 64
    assert found.truncated_rows == sum(length > 64 for length in data.prepared.train["length"]) - sum(
        length > 64 for length in data.verify["length"]
    )
    assert found.tokens <= 64 * found.rows
    for row in data.verify:
        assert byte_tokenizer().decode(row["input_ids"][row["answer_start"] :]).startswith("the answer")
    assert max(data.verify["length"]) > 64


def test_a_document_longer_than_any_row_is_cut_and_counted(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.txt" for i in range(8)]
    for i, path in enumerate(paths):
        path.write_text(f"{i} goes on " * 100)
    data = drawn(
        calibrate={"data": [{"path": str(p), "sample_by": "document"} for p in paths], "samples": 6}, max_length=32
    )
    assert (audit(data).windows, audit(data).truncated_rows) == (6, 6)


def test_rows_too_long_to_train_on_are_skipped_as_in_the_training(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.txt", *("x" * n for n in range(1, 101)))
    settings: dict[str, Any] = {"eval_fraction": 0.2, "on_too_long": "skip", "max_length": 80}
    data, trained = drawn(path, **settings), trained_on(path, **settings)
    assert data.prepared.train.to_list() == trained.train.to_list()
    assert len(drawn(path, **settings | {"on_too_long": "stop"}).prepared.train) == 80


def test_the_audit_is_of_the_windows(many: str) -> None:
    data = drawn(many)
    found, ids = audit(data), list(chain.from_iterable(data.windows))
    assert (found.windows, found.window_tokens, found.tokens) == (4, 64, 256)
    assert found.distinct_tokens == len(set(ids))
    assert found.vocabulary_share == pytest.approx(len(set(ids)) / len(byte_tokenizer()))
    assert found.sha256 == hashlib.sha256(np.array(ids, dtype="<i4").tobytes()).hexdigest()
    lengths = list(data.prepared.train["length"])
    assert min(lengths) <= found.row_length_p5 <= found.row_length_p50 <= found.row_length_p95 <= max(lengths)
    assert found.by_source == {many: found.rows}
    assert json.loads(json.dumps(found.model_dump(), allow_nan=False)) == found.model_dump()


def test_a_set_that_suffices_is_taken_without_a_word(tmp_path: Path) -> None:
    data = drawn(chats(tmp_path / "a.jsonl", 200), calibrate={"samples": FEW, "verify_samples": FEW})
    assert data.warnings == ()
    assert len(data.windows) == FEW


def test_a_set_that_fills_fewer_windows_gives_those_and_says_so(many: str) -> None:
    data = drawn(many, calibrate={"samples": 128})
    total = sum(data.prepared.train["length"]) - sum(data.verify["length"])
    assert len(data.windows) == total // 64 > FEW
    assert {len(window) for window in data.windows} == {64}
    assert data.warnings[0] == f"the rows fill {total // 64} of 128 windows"
    assert "2 rows to verify on" in data.warnings[1]


@pytest.mark.parametrize(("tokens", "samples", "windows"), [(128, 99, (4, 32)), (203, 99, (4, 50)), (203, 2, (2, 101))])
def test_a_set_that_does_not_fill_one_window_is_cut_into_short_ones(
    tmp_path: Path, tokens: int, samples: int, windows: tuple[int, int]
) -> None:
    path = lines(tmp_path / "a.txt", "x" * (tokens - 1))
    data = drawn(
        path, eval=lines(tmp_path / "b.txt", "other"), calibrate={"samples": samples, "max_length": 512}, max_length=600
    )
    assert (len(data.windows), len(data.windows[0])) == windows
    assert len({len(window) for window in data.windows}) == 1
    count, length = windows
    assert data.warnings[0] == (
        f"the rows do not fill one window of 512 tokens: they are cut into {count} windows of {length} tokens"
    )
    assert data.warnings[1].startswith(f"{count} calibration windows")


@pytest.mark.parametrize(
    ("tokens", "samples", "max_length", "least"), [(127, 99, 512, 128), (31, 1, 512, 32), (63, 99, 64, 64)]
)
def test_a_tiny_set_is_refused_with_its_tokens_and_the_least(
    tmp_path: Path, tokens: int, samples: int, max_length: int, least: int
) -> None:
    path, held_out = lines(tmp_path / "a.txt", "x" * (tokens - 1)), lines(tmp_path / "b.txt", "other")
    with pytest.raises(DataError, match=rf"hold {tokens} tokens, and at least {least} are needed; .* data\.tr"):
        drawn(path, eval=held_out, calibrate={"samples": samples, "max_length": max_length})


def test_a_narrow_vocabulary_is_told(many: str) -> None:
    tokenizer = byte_tokenizer()
    assert not [warning for warning in drawn(many, tokenizer=tokenizer).warnings if "narrow" in warning]
    tokenizer.add_tokens([f"<unused {i}>" for i in range(5000)])
    data = drawn(many, tokenizer=tokenizer)
    (warning,) = [warning for warning in data.warnings if "narrow" in warning]
    share = audit(data).distinct_tokens / len(tokenizer)
    assert f"{audit(data).distinct_tokens} distinct tokens, {share:.1%} of the vocabulary" in warning


@pytest.mark.parametrize(("copies", "told"), [(10, False), (11, True)])
def test_many_repeated_rows_are_told(tmp_path: Path, copies: int, told: bool) -> None:
    rows = [f"number {i:02d}" for i in range(40)]
    path = lines(tmp_path / "a.txt", *rows, *rows[:copies])
    data = drawn(path, eval=lines(tmp_path / "b.txt", "other"), calibrate={"samples": 999})
    assert audit(data).duplicate_rows == copies
    assert (f"{copies} of {40 + copies} calibration rows repeat another one" in data.warnings) is told


def test_a_weight_repeats_rows_only_once_all_are_drawn(tmp_path: Path) -> None:
    source = {"path": letters(tmp_path / "a.txt", "a", 20), "weight": 2.0}
    data = drawn(source, eval=lines(tmp_path / "b.txt", "other"), calibrate={"samples": 5, "max_length": 60})
    assert (audit(data).rows, audit(data).duplicate_rows) == (30, 10)
