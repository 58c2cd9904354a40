"""The data section -> encoded rows, what was found on the way, and batches."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from qft.data.batch import Collator, pad_token_id
from qft.data.encoded import EncodedRows, read_rows, write_rows
from qft.data.prepare import KEPT, Prepared, held_out, prepare
from qft.errors import DataError
from qft.recipe.data import DataSection
from tests.support.models import byte_tokenizer
from tests.support.rows import chat, write_jsonl


def section(train: Any, **data: Any) -> DataSection:
    return DataSection.model_validate({"train": train, "max_length": 2048, **data})


def prepared(train: Any, seed: int = 0, **data: Any) -> Prepared:
    return prepare(section(train, **data), byte_tokenizer(), seed)


def kept_out(train: Any, seed: int = 0, **data: Any) -> EncodedRows:
    found = held_out(section(train, **data), byte_tokenizer(), seed)
    assert found is not None
    return found


def chats(path: Path, count: int) -> str:
    return str(write_jsonl(path, [chat(f"{path.stem} {i}", f"it is {i}") for i in range(count)]))


def lines(path: Path, *rows: Any) -> str:
    """A file of rows, those that are texts written as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return str(path)


def taken(rows: Any) -> Counter[tuple[int, int]]:
    """How many times each (source, row) is there."""
    return Counter(zip(rows["source"], rows["row"], strict=True))


def test_bad_rows_are_listed_ten_at_most_with_their_lines_the_count_and_the_remedy(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", chat("a", "b"), "", "{", *[{"messages": []}] * 12)
    with pytest.raises(DataError) as caught:
        prepared(path)
    first, *others, more, remedy = str(caught.value).split("\n")
    assert first.startswith(f"{path}:3: not valid JSON")
    assert others == [f"{path}:{n}: messages: needs a list of turns" for n in range(4, 13)]
    assert "3 more" in more
    assert remedy.startswith("13 rows")
    assert remedy.endswith("data.on_bad_row: skip")


BAD: dict[str, Any] = {"messages": []}
LONG = chat("a", "b" * 99)


@pytest.mark.parametrize(
    ("rows", "remedies"),
    [
        ([BAD], {"data.on_bad_row"}),
        ([LONG, LONG], {"data.on_too_long"}),
        ([LONG, BAD], {"data.on_bad_row", "data.on_too_long"}),
    ],
    ids=["a bad row", "long rows", "both"],
)
@pytest.mark.parametrize("part", ["train", "eval"])
def test_the_remedy_is_that_of_the_rows_that_stop_the_run(
    tmp_path: Path, part: str, rows: list[Any], remedies: set[str]
) -> None:
    good, path = chats(tmp_path / "good.jsonl", 2), lines(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(DataError) as caught:
        prepared(**({"train": [good, path]} if part == "train" else {"train": good, "eval": path}), max_length=64)
    *listed, remedy = str(caught.value).split("\n")
    assert [line.split(": ")[0] for line in listed] == [f"{path}:{i}" for i in range(1, len(rows) + 1)]
    assert {name for name in ("data.on_bad_row", "data.on_too_long") if name in remedy} == remedies


@pytest.mark.parametrize(
    ("policies", "kept", "skipped", "truncated"),
    [
        ({"on_bad_row": "skip", "on_too_long": "skip"}, [1, 5], 3, 0),
        ({"on_bad_row": "skip", "on_too_long": "truncate"}, [1, 4, 5], 2, 1),
    ],
    ids=["skip", "truncate"],
)
def test_rows_that_are_skipped_or_truncated_are_counted(
    tmp_path: Path, policies: dict[str, Any], kept: list[int], skipped: int, truncated: int
) -> None:
    path = lines(tmp_path / "a.jsonl", chat("a", "b"), "", BAD, LONG, chat("c", "d"), chat("e" * 99, "cut off"))
    result = prepared(path, max_length=64, **policies)
    assert [result.place(0, row) for row in result.train["row"]] == [f"{path}:{line}" for line in kept]
    facts = result.sources[0]
    assert (facts.rows, facts.skipped, facts.truncated) == (len(kept), skipped, truncated)
    assert facts.longest == (64 if truncated else 23)


def test_a_policy_for_bad_rows_is_none_for_long_rows(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", BAD, LONG, chat("a", "b"))
    with pytest.raises(DataError, match=r"a\.jsonl:2: \d+ tokens") as caught:
        prepared(path, format="messages", max_length=64, on_bad_row="skip")
    assert "a.jsonl:1" not in str(caught.value)
    with pytest.raises(DataError, match=r"a\.jsonl:1: messages") as caught:
        prepared(path, format="messages", max_length=64, on_too_long="skip")
    assert "a.jsonl:2" not in str(caught.value)


def test_weights_give_exact_counts_drawn_by_the_seed(tmp_path: Path) -> None:
    weights = {"half": 0.5, "twice": 2.0, "more": 1.5}
    sources = [{"path": chats(tmp_path / f"{name}.jsonl", 10), "weight": w} for name, w in weights.items()]
    result = prepared(sources, seed=3)
    counts = taken(result.train)
    per_source = [sorted(n for (source, _), n in counts.items() if source == i) for i in range(3)]
    assert per_source == [[1] * 5, [2] * 10, [1] * 5 + [2] * 5]
    assert [facts.weight for facts in result.sources] == list(weights.values())
    assert [facts.rows for facts in result.sources] == [10, 10, 10]
    assert prepared(sources, seed=3).train.to_list() == result.train.to_list()
    assert taken(prepared(sources, seed=4).train) != counts


def test_eval_files_are_held_out_and_their_rows_know_their_file(tmp_path: Path) -> None:
    train, held_out = chats(tmp_path / "train.jsonl", 4), chats(tmp_path / "eval.jsonl", 3)
    result = prepared(train, eval=[held_out])
    assert result.eval is not None
    assert taken(result.train) == {(0, i): 1 for i in range(4)}
    assert taken(result.eval) == {(1, i): 1 for i in range(3)}
    assert [(facts.path, facts.part) for facts in result.sources] == [(train, "train"), (held_out, "eval")]
    assert result.place(1, 2) == f"{held_out}:3"


@pytest.mark.parametrize("weight", [1.0, 2.0, 0.5])
@pytest.mark.parametrize(("fraction", "count"), [(0.25, 5), (0.01, 1), (0.9, 18)])
def test_an_eval_fraction_is_drawn_by_the_seed_and_never_trained_on(
    tmp_path: Path, weight: float, fraction: float, count: int
) -> None:
    source = {"path": chats(tmp_path / "a.jsonl", 20), "weight": weight}
    result = prepared(source, eval_fraction=fraction)
    assert result.eval is not None
    train, held_out = taken(result.train), taken(result.eval)
    assert held_out.total() == len(held_out) == count
    assert train.total() == round(weight * (20 - count))
    assert not train.keys() & held_out.keys()
    if weight >= 1:
        assert train.keys() | held_out.keys() == {(0, i) for i in range(20)}
    again = prepared(source, eval_fraction=fraction)
    assert again.eval is not None
    assert (again.train.to_list(), again.eval.to_list()) == (result.train.to_list(), result.eval.to_list())
    others = [prepared(source, eval_fraction=fraction, seed=seed).eval for seed in range(1, 4)]
    assert any(other is not None and taken(other) != held_out for other in others)


def spread(folder: Path) -> list[str]:
    """Three sources of several formats and units, with blank lines between their rows."""
    table = folder / "b.csv"
    table.write_text("prompt,completion\n" + "".join(f"row {i},yes\n" for i in range(9)))
    (folder / "c.txt").write_text("".join(f"text {i}\n" + "\n" * (i % 3) for i in range(15)))
    rows = [row for i in range(12) for row in ("", chat(f"say {i}", f"it is {i}"))]
    return [lines(folder / "a.jsonl", *rows), str(table), str(folder / "c.txt")]


FEW = {"eval_fraction": 0.03}
MANY = {"eval_fraction": 0.3}
SKIP = {"on_too_long": "skip"}


@pytest.mark.parametrize(
    ("held", "policies", "seed"),
    [
        *itertools.product([FEW, MANY], [{}, {"on_too_long": "truncate"}], range(2)),
        *[(MANY, SKIP, 2), (FEW, {"on_bad_row": "skip"}, 2), ("files", {}, 0), ("files", SKIP, 1)],
        (MANY, {"num_proc": 2}, 0),
    ],
)
def test_held_out_alone_the_rows_are_the_same(tmp_path: Path, held: Any, policies: dict[str, Any], seed: int) -> None:
    sources = spread(tmp_path)
    settings = {"eval": sources[1:], "train": sources[:1]} if held == "files" else {"train": sources, **held}
    settings |= policies | {"max_length": 64}
    alone, beside = kept_out(**settings, seed=seed), prepared(**settings, seed=seed)
    assert beside.eval is not None
    assert alone.rows.to_list() == beside.eval.to_list()
    assert alone.rows.features == beside.eval.features
    places = [(source, row) for source, row in zip(alone.rows["source"], alone.rows["row"], strict=True)]
    assert [alone.place(*place) for place in places] == [beside.place(*place) for place in places]


@pytest.mark.parametrize("held", ["file", "fraction"])
def test_rows_beside_those_held_out_are_not_encoded(tmp_path: Path, held: str) -> None:
    path = tmp_path / "a.jsonl"
    rows = [chat(f"say {i}", f"it is {i}") for i in range(20)]
    settings: dict[str, Any] = {"eval_fraction": 0.2, "format": "messages"}
    if held == "file":
        settings = {"eval": chats(tmp_path / "b.jsonl", 3), "format": "messages"}
    before = kept_out(lines(path, *rows), **settings)
    held_rows = set(before.rows["row"]) if held == "fraction" else set()
    lines(path, *(row if i in held_rows else BAD for i, row in enumerate(rows)))
    with pytest.raises(DataError):
        prepared(str(path), **settings)
    assert kept_out(str(path), **settings).rows.to_list() == before.rows.to_list()


def test_without_rows_held_out_there_are_none(tmp_path: Path) -> None:
    section = DataSection.model_validate({"train": str(tmp_path / "is not even read.jsonl")})
    assert held_out(section, byte_tokenizer(), 0) is None
    with pytest.raises(DataError, match="no row is left"):
        kept_out(lines(tmp_path / "a.jsonl", "", ""), eval_fraction=0.5, format="messages")


@pytest.mark.parametrize(("held", "part", "count"), [({"eval_fraction": 0.3}, "eval", 11), ({}, "train", KEPT)])
def test_the_rows_that_a_model_is_asked_are_read_as_they_were_written(
    tmp_path: Path, held: dict[str, Any], part: str, count: int
) -> None:
    data = prepared(spread(tmp_path), **held)
    asked = data.asked()
    write_rows(tmp_path / "rows.jsonl", asked)
    found, first = read_rows(tmp_path / "rows.jsonl"), read_rows(tmp_path / "rows.jsonl", 3)
    assert (found.part, len(found.rows)) == (part, count)
    assert found.rows.to_list() == ((data.eval or data.train).to_list())[:count]
    assert found.rows.features == asked.rows.features
    assert first.rows.to_list() == found.rows.to_list()[:3]
    places = {(row["source"], row["row"]) for row in found.rows}
    assert [found.place(*place) for place in places] == [data.place(*place) for place in places]
    assert len({source for source, _ in places}) > 1


@pytest.mark.parametrize("content", ["", "{", "[]\n", '{"part": "eval"}\n', "\xff"])
def test_another_file_holds_no_encoded_rows(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content, "latin-1")
    with pytest.raises(DataError, match=r"rows\.jsonl: holds no encoded rows"):
        read_rows(tmp_path / "rows.jsonl")


def test_each_source_has_a_format_of_its_own_that_the_facts_give(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("instruction,output,source,row,status\nhi,yo,wiki,007,bad\n")
    (tmp_path / "c.txt").write_text("some\n\ntext\n")
    result = prepared(
        [
            lines(tmp_path / "a.jsonl", "{", chat("hi", "yo")),
            str(tmp_path / "b.csv"),
            str(tmp_path / "c.txt"),
            lines(tmp_path / "d.jsonl", {"prompt": "hi", "completion": "yo"}),
            lines(
                tmp_path / "e.jsonl",
                {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
            ),
            {"path": lines(tmp_path / "f.jsonl", {**chat("hi", "yo"), "text": "plain"}), "format": "text"},
        ],
        on_bad_row="skip",
    )
    assert [facts.format for facts in result.sources] == [
        *("messages", "alpaca", "text", "prompt_completion", "sharegpt", "text")
    ]
    texts = [byte_tokenizer().decode(ids) for ids in result.train["input_ids"]]
    talk = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    assert texts == [talk, talk, "some<|im_end|>", "text<|im_end|>", talk, talk, "plain<|im_end|>"]
    places = [
        result.place(s, r).rpartition("/")[2] for s, r in zip(result.train["source"], result.train["row"], strict=True)
    ]
    assert places == ["a.jsonl:2", "b.csv: row 1", "c.txt:1", "c.txt:3", "d.jsonl:1", "e.jsonl:1", "f.jsonl:1"]


@pytest.mark.parametrize("where", ["data", "source"])
def test_a_format_that_is_given_is_not_guessed(tmp_path: Path, where: str) -> None:
    path = lines(tmp_path / "a.jsonl", {**chat("hi", "yo"), "text": "plain"})
    with pytest.raises(DataError, match=rf"^{path}:1: .* messages and text; say which with data\.format"):
        prepared(path)
    given = (
        prepared(path, format="text")
        if where == "data"
        else prepared({"path": path, "format": "text"}, format="messages")
    )
    assert [facts.format for facts in given.sources] == ["text"]


def test_rows_are_encoded_by_as_many_processes_as_asked(chat_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = Dataset.map

    def counted(*args: Any, **kw: Any) -> Any:
        asked.append(kw["num_proc"])
        return real(*args, **kw)

    monkeypatch.setattr(Dataset, "map", counted)
    one, two = prepared(str(chat_file)), prepared(str(chat_file), num_proc=2)
    assert one.eval is two.eval is None
    assert two.train.to_list() == one.train.to_list()
    assert two.sources == one.sources
    assert asked == [None, 2]


def test_the_facts_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab\nabcd\n")
    talks = lines(tmp_path / "b.jsonl", chat("question", "yo"), chat("q", "answer"))
    plain, chatty = prepared([str(tmp_path / "a.txt"), talks]).sources
    # An end token each; the first token is never predicted.
    assert (plain.rows, plain.tokens, plain.supervised_tokens, plain.longest) == (2, 3 + 5, 2 + 4, 5)
    around = len("user\nassistant\n") + 2 * len(["start", "end", "\n"])
    assert (chatty.rows, chatty.tokens, chatty.supervised_tokens) == (2, 2 * around + 10 + 7, 3 + 7)
    assert chatty.longest == around + 10
    assert chatty.digest == hashlib.sha256(Path(talks).read_bytes()).hexdigest()
    assert (chatty.path, chatty.part, chatty.unit, chatty.skipped, chatty.truncated) == (talks, "train", "line", 0, 0)


def test_each_row_knows_its_length_and_what_of_it_is_learnt(chat_file: Path) -> None:
    for row in prepared(str(chat_file)).train:
        assert row["length"] == len(row["input_ids"]) == len(row["labels"])
        assert row["supervised"] == sum(label != -100 for label in row["labels"])
        assert row["labels"][row["answer_start"] :][: row["supervised"]] == row["input_ids"][row["answer_start"] : -1]


@pytest.mark.parametrize(
    ("name", "content", "settings", "reason"),
    [
        (
            "a.jsonl",
            '{"messages": []}\n',
            {"on_bad_row": "skip"},
            "data.train: no row is left to use: 1 were skipped, such as .*a.jsonl:1: messages: needs a list",
        ),
        (
            "a.jsonl",
            json.dumps(LONG) + "\n",
            {"max_length": 64, "on_too_long": "skip"},
            r"no row is left to use: 1 were skipped, such as .*a.jsonl:1: \d+ tokens, and data.max_length is 64",
        ),
        ("a.jsonl", "\n \n", {"format": "messages"}, "data.train: no row is left to use: all are blank"),
        ("a.jsonl", "\n \n", {}, "a.jsonl:1: blank; nor can any"),
        ("a.jsonl", json.dumps(chat("a", "b")) + "\n", {"eval_fraction": 0.5}, "no row is left to use: data.eval_"),
        ("a.json", "[]", {"format": "messages"}, "a.json: holds no row"),
        ("a.json", "[]", {}, "a.json: holds no row"),
    ],
    ids=["bad", "long", "blank", "blank and unknown", "held out", "no item", "no item and unknown"],
)
def test_no_row_at_all_is_refused(
    tmp_path: Path, name: str, content: str, settings: dict[str, Any], reason: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=reason):
        prepared(str(tmp_path / name), **settings)


def test_an_eval_file_without_a_usable_row_is_refused(tmp_path: Path) -> None:
    train, held_out = chats(tmp_path / "a.jsonl", 2), lines(tmp_path / "b.jsonl", BAD)
    with pytest.raises(DataError, match=r"data\.eval: no row is left"):
        prepared(train, eval=held_out, format="messages", on_bad_row="skip")


def row(length: int, source: int = 0, number: int = 0) -> dict[str, Any]:
    ids = list(range(10, 10 + length))
    return {"input_ids": ids, "labels": [-100, *ids[1:]], "source": source, "row": number}


@pytest.mark.parametrize(
    ("lengths", "multiple", "width"),
    [([3], 8, 8), ([8], 8, 8), ([3, 9], 8, 16), ([5, 7], 1, 7), ([1, 64, 65], 64, 128)],
)
def test_a_batch_is_padded_on_the_right_to_a_multiple(lengths: list[int], multiple: int, width: int) -> None:
    batch = Collator(pad=2, multiple=multiple)([row(n, source=7, number=2**40 + n) for n in lengths])
    assert batch.pop("learnt_tokens") == tuple(n - 1 for n in lengths), "labels behind the first"
    assert batch.pop("rows") == tuple(((7, 2**40 + n),) for n in lengths)
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(
        ["input_ids", "attention_mask", "labels"], torch.int64
    )
    for i, n in enumerate(lengths):
        rest = width - n
        assert batch["input_ids"][i].tolist() == row(n)["input_ids"] + [2] * rest
        assert batch["labels"][i].tolist() == row(n)["labels"] + [-100] * rest
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * rest


def test_an_end_token_is_learnt_even_where_it_is_the_padding(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    train = prepared(lines(tmp_path / "a.jsonl", chat("a", "b"), chat("a", "b" * 20))).train
    batch = Collator(pad_token_id(tokenizer))(train.to_list())
    ends = batch["input_ids"] == tokenizer.eos_token_id
    assert [int((ends[i] & (batch["labels"][i] == tokenizer.eos_token_id)).sum()) for i in range(2)] == [1, 1]
    for i, length in enumerate(train["length"]):
        assert batch["attention_mask"][i].sum() == length
        assert ends[i, length:].all()
        assert (batch["labels"][i, length:] == -100).all()


@pytest.mark.parametrize(
    ("pad", "unk", "eos", "expected"), [(0, 5, 2, 0), (None, 5, 2, 2), (None, 5, None, 5), (None,) * 3 + (0,)]
)
def test_some_token_can_always_pad(pad: int | None, unk: int | None, eos: int | None, expected: int) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id = pad, unk, eos
    assert pad_token_id(tokenizer) == expected
