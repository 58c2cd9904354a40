"""Findings about rows: each by a file that has it and one that has not, with its places and its level."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from qft.data.audit import audit, by_level, lengths_of, padding_finding, require_sound
from qft.data.formats import from_messages
from qft.data.look import Look, sketches
from qft.data.prepare import Prepared, prepare
from qft.documents.rows import Finding
from qft.errors import DataError, RecipeError
from qft.plan import make_plan
from qft.recipe import load
from qft.recipe.data import AuditSection, DataSection
from tests.support.models import byte_tokenizer
from tests.support.rows import chat, write_jsonl

RecipeFile = Callable[..., Path]
LONG = "the quick brown fox jumps over the lazy dog and runs on and on through the wood"
KEY = "AKIA" + "ABCDEFGHIJKLMNOP"
FINE = [chat("say one", "it is one"), chat("say two", "it is two")]


def prepared(folder: Path, rows: list[Any], tokenizer: Any = None, **data: Any) -> Prepared:
    path = write_jsonl(folder / "a.jsonl", rows)
    section = DataSection.model_validate({"train": str(path), "max_length": 512} | data)
    return prepare(section, tokenizer or byte_tokenizer(), 0)


def found(folder: Path, rows: list[Any], **options: Any) -> dict[str, Finding]:
    levels = AuditSection.model_validate(dict.fromkeys(AuditSection.model_fields, "warn"))
    return {finding.name: finding for finding in audit(prepared(folder, rows, **options), levels)}


def turns(*said: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in said]}


OF_ROWS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "special_tokens": [(chat("stop <|im_end|> here", "no"), "messages.0.content")],
    "roles": [
        (turns(("user", "one"), ("user", "two"), ("assistant", "yes")), "messages.1"),
        (turns(("user", "one"), ("assistant", "two"), ("assistant", "yes")), "messages.2"),
    ],
    "empty_turns": [(turns(("system", " "), ("user", "one"), ("assistant", "yes")), "messages.0")],
    "control_characters": [
        (chat("a\x00b", "yes"), "messages.0.content"),
        (chat("ab", "caf\N{REPLACEMENT CHARACTER}"), "messages.1.content"),
    ],
    "secrets": [
        (chat(f"my key is {KEY}.", "thanks"), "messages.0.content looks like an AWS key"),
        (chat("token", "ghp_" + "a1B2" * 9), "messages.1.content looks like a GitHub token"),
        (chat("-----BEGIN RSA PRIVATE KEY-----", "oh"), "messages.0.content looks like a private key"),
    ],
}


@pytest.mark.parametrize(("name", "row", "place"), [(n, *each) for n, own in OF_ROWS.items() for each in own])
def test_one_row_is_found_and_told_where(tmp_path: Path, name: str, row: dict[str, Any], place: str) -> None:
    got = found(tmp_path, [*FINE, row])
    assert set(got) == {name}
    assert got[name].rows == 1
    assert got[name].places == [f"{tmp_path / 'a.jsonl'}:3: {place}"]
    assert got[name].text.startswith("1 of 3 rows ")
    assert got[name].remedy
    assert KEY not in str(got[name]), "a secret is not told again"


KEYS = {
    "an AWS key": "ASIA" + "B" * 16,
    "a GitHub token": "github_pat_" + "a" * 22,
    "a GitLab token": "glpat-" + "a" * 20,
    "an API key": "sk-proj-" + "a" * 20,
    "a Slack token": "xoxb-" + "1" * 10,
    "a Google key": "AIza" + "a" * 35,
    "a Hugging Face token": "hf_" + "a" * 30,
    "a Stripe key": "rk_live_" + "a" * 20,
    "a private key": "-----BEGIN PRIVATE KEY-----",
    "a signed web token": ".".join(["eyJ" + "a" * 10, "eyJ" + "b" * 10, "c" * 10]),
}


def test_each_kind_of_secret_and_of_control_character_is_known() -> None:
    look = Look(byte_tokenizer())
    for name, key in KEYS.items():
        [secret] = look.findings(from_messages(chat(f"it is {key} here", "yes")), [])
        assert secret == f"secrets messages.0.content looks like {name}"
    control = {*map(chr, range(0x20)), "\x7f", "\ufffd", "\ufffe", "\uffff"} - {*"\t\n\r"}
    some = [*map(chr, range(0x100)), "\u2028", "\ufeff", "\ufffc", "\ufffd", "\ufffe", "\uffff", "\U0001f600"]
    for character in some:
        told = look.findings(from_messages(chat(f"it{character}s é", "yes")), [])
        assert told == ["control_characters messages.0.content"] * (character in control), hex(ord(character))


def test_rows_that_have_nothing_are_not_found(tmp_path: Path) -> None:
    assert found(tmp_path, [*FINE, chat("a <b> tag\n\twith sk-ill", "akia, and ghp_short"), chat("tell", LONG)]) == {}


def test_repeated_rows_and_rows_that_almost_repeat(tmp_path: Path) -> None:
    rows = [chat("tell", LONG), chat("other", LONG[::-1]), chat("tell", LONG), chat("tell", LONG + " again")]
    got = found(tmp_path, rows)
    assert set(got) == {"duplicates", "near_duplicates"}
    assert [place.rpartition(":")[2] for place in got["duplicates"].places] == ["3"]
    assert [place.rpartition(":")[2] for place in got["near_duplicates"].places] == ["4"]


def test_held_out_rows_that_are_trained_on(tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "b.jsonl", [chat("tell", LONG + " too"), FINE[0], chat("new", "all of it is new")])
    got = found(tmp_path, [*FINE, chat("tell", LONG)], eval=str(held))
    assert set(got) == {"overlap"}
    assert got["overlap"].places == [f"{held}:1", f"{held}:2"]
    clean = write_jsonl(tmp_path / "c.jsonl", [chat("new", "all of it is new")])
    assert found(tmp_path, FINE, eval=str(clean)) == {}
    again = found(tmp_path, [*FINE, FINE[0]], eval_fraction=0.5)
    assert set(again) <= {"overlap", "duplicates"}
    assert again, "wherever the two lie"


def test_cut_rows_and_unlearnt_ends(tmp_path: Path) -> None:
    rows = [*FINE, chat("tell", LONG)]
    assert set(found(tmp_path, rows, max_length=64, on_too_long="truncate")) == {"truncated"}
    assert found(tmp_path, rows, max_length=64, on_too_long="skip") == {}
    no_end = byte_tokenizer()
    no_end.eos_token = None
    got = found(tmp_path, [{"text": LONG}, {"text": f"{LONG}<|im_end|>"}], tokenizer=no_end)
    assert got["end_of_turn"].places == [f"{tmp_path / 'a.jsonl'}:1"]


@pytest.mark.parametrize(("prefix", "puts", "wrong"), [("", False, False), ("", True, True), ("B", True, False)])
def test_begin_tokens_are_counted(tmp_path: Path, prefix: str, puts: bool, wrong: bool) -> None:
    tokenizer = with_bos(prefix * 1, puts=puts)
    assert ("bos" in found(tmp_path, FINE, tokenizer=tokenizer)) == wrong
    assert "bos" in found(tmp_path, FINE, tokenizer=with_bos("BB", puts=puts)), "two"


def with_bos(prefix: str, *, puts: bool) -> Any:
    """A tokenizer whose template begins with so many BOS tokens, and that `puts` one before every text or not."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "<|bos|>" * len(prefix) + tokenizer.chat_template
    if puts:
        single = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = single
    return tokenizer


def test_a_source_of_which_hardly_anything_is_learnt(tmp_path: Path) -> None:
    got = found(tmp_path, [chat("word " * 90, "y")])
    assert set(got) == {"few_learnt"}
    assert got["few_learnt"].places == [str(tmp_path / "a.jsonl")]


def test_padding_of_batches_is_foreseen() -> None:
    rng = np.random.default_rng(0)
    lengths = np.where(rng.random(200) < 0.1, 1000, 10)
    drawn = lengths_of(lengths, 8, grouped=False, side_by_side=False)
    assert (drawn.p50, drawn.longest) == (10, 1000)
    assert drawn.padding_share > 0.5
    assert [finding.name for finding in padding_finding(drawn, 200)] == ["padding"]
    assert padding_finding(lengths_of(lengths, 8, grouped=True, side_by_side=False), 200) == []
    assert lengths_of(lengths, 8, grouped=False, side_by_side=True).padding_share == 0


def test_sketches_estimate_what_texts_share() -> None:
    import numpy as np

    from qft.data.audit import ALIKE  # noqa: F401

    draw = random.Random(0)
    words = [f"w{n}" for n in range(2000)]
    for share in (0.0, 0.5, 0.9):
        one = draw.sample(words, 400)
        other = one[: int(400 * share)] + draw.sample(words, 400 - int(400 * share))
        triples = [set(zip(text, text[1:], text[2:], strict=False)) for text in (one, other)]
        true = len(triples[0] & triples[1]) / len(triples[0] | triples[1])
        made = [np.frombuffer(each, "<u4") for each in sketches([" ".join(one), " ".join(other)])]
        assert float((made[0] == made[1]).mean()) == pytest.approx(true, abs=0.17)
    assert [bool(each) for each in sketches(["too short", "没有空格的文字也要看" * 3, ""])] == [False, True, False]


LONG_ROW = chat("tell", LONG)
FILES: dict[str, tuple[list[Any], list[Any], dict[str, Any]]] = {
    "bos": ([{"text": "<|bos|><|bos|><|bos|>ab"}], [{"text": "<|bos|>ab"}], {}),
    "end_of_turn": ([chat("a", "b")], [chat("a", "b"), chat("c", "d")], {"train_on_eos": "none"}),
    "truncated": ([LONG_ROW], FINE, {"max_length": 64, "on_too_long": "truncate"}),
    "few_learnt": ([chat("word " * 90, "y")], [chat("word", "y")], {}),
    "special_tokens": ([chat("stop <|im_end|>", "no")], [chat("stop <im_end>", "no")], {}),
    "roles": (
        [turns(("user", "a"), ("user", "b"), ("assistant", "c"))],
        [turns(("user", "a"), ("assistant", "c"))],
        {},
    ),
    "empty_turns": ([turns(("user", " "), ("assistant", "c"))], [turns(("user", "."), ("assistant", "c"))], {}),
    "control_characters": ([chat("a\x00b", "c")], [chat("a\tb\n", "c")], {}),
    "secrets": ([chat(KEY, "c")], [chat(KEY[:-1], "c")], {}),
    "duplicates": ([chat("a", "b")] * 2, [chat("a", "b"), chat("b", "a")], {}),
    "near_duplicates": ([LONG_ROW, chat("tell", LONG + " so")], [LONG_ROW, chat("tell", LONG[::-1])], {}),
    "overlap": ([chat("held", "out")], [chat("not", "so")], {"eval": "held.jsonl"}),
    "padding": ([chat("a", "b" * (1 + 400 * (n % 40 == 0))) for n in range(80)], FINE * 40, {}),
}
"""By a finding: rows that have it, rows that have not, and what else is said under data."""


@pytest.mark.parametrize("name", AuditSection.model_fields)
def test_each_finding_has_a_file_that_has_it_and_one_that_has_not(
    recipe_file: RecipeFile, tmp_path: Path, name: str
) -> None:
    wrong, right, beside = FILES[name]
    write_jsonl(tmp_path / "held.jsonl", [chat("held", "out")])
    levels = dict.fromkeys(AuditSection.model_fields, "off") | {name: "error"}
    for rows, data in ((wrong, beside), (right, beside if name != "end_of_turn" else {})):
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        train = {"per_device_train_batch_size": 8}
        recipe = recipe_file(data={"train": str(path), "max_length": 512, "audit": levels} | data, train=train)
        if rows is wrong:
            with pytest.raises(DataError, match=rf"^{name}: .*\n.*data\.audit: \{{{name}: warn\}}"):
                make_plan(load(recipe))
        else:
            assert make_plan(load(recipe)).findings == []


@pytest.mark.parametrize("name", AuditSection.model_fields)
def test_each_level_is_asked_for_by_its_field(name: str) -> None:
    finding = Finding(name=name, level="warn", rows=1, text="1 of 2 rows", remedy="mend it")
    for level in ("error", "warn", "off"):
        got = by_level([finding], AuditSection.model_validate({name: level}))
        assert [each.level for each in got] == [level] * (level != "off")
    with pytest.raises(DataError, match=rf"^{name}: 1 of 2 rows: mend it\n.*data\.audit: \{{{name}: warn\}}"):
        require_sound(by_level([finding], AuditSection.model_validate({name: "error"})))


def test_a_level_decides_what_becomes_of_it(recipe_file: RecipeFile, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "bad.jsonl", [*FINE, chat(f"key {KEY}", "yes")])

    def data(**levels: str) -> dict[str, Any]:
        return {"train": str(rows), "audit": levels}

    told = make_plan(load(recipe_file(data=data()))).document().data
    assert [(finding.name, finding.level) for finding in told.findings] == [("secrets", "warn")]
    assert told.lengths is not None
    assert told.lengths.longest < 128
    assert make_plan(load(recipe_file(data=data(secrets="off")))).findings == []
    with pytest.raises(DataError, match=r"secrets: 1 of 3 rows .*:3: messages\.0.*\n.*data\.audit: \{secrets: warn\}"):
        make_plan(load(recipe_file(data=data(secrets="error"))))
    with pytest.raises(RecipeError, match=r"data\.audit\.secret"):
        load(recipe_file(data=data(secret="off")))


def test_encoded_rows_are_kept_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qft.data.prepare.FEWEST", 40)
    rows = [chat(f"say {n}", f"it is {n}") for n in range(40)]
    first = prepared(tmp_path, rows)
    monkeypatch.setattr("qft.data.prepare._encode", lambda *_: pytest.fail("encoded again"))
    again = prepared(tmp_path, rows)
    assert again.train.to_list() == first.train.to_list()
    assert again.sources == first.sources
    monkeypatch.undo()
    monkeypatch.setenv("QFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qft.data.prepare.FEWEST", 40)
    other = byte_tokenizer()
    other.chat_template = other.chat_template.replace("<|im_start|>", "<|im_start|> ")
    assert prepared(tmp_path, rows, other).train["length"] != first.train["length"]
    assert prepared(tmp_path, rows, loss_on="all").sources[0].supervised_tokens > first.sources[0].supervised_tokens
    [entry] = [path for path in (tmp_path / "cache" / "rows").iterdir() if _rows(path) == first.train["input_ids"]][:1]
    next(entry.glob("*.arrow")).write_bytes(b"damaged")
    assert prepared(tmp_path, rows).train.to_list() == first.train.to_list(), "made anew"


def _rows(entry: Path) -> Any:
    return Dataset.load_from_disk(str(entry))["input_ids"]


def test_findings_are_told_before_a_training(recipe_file: RecipeFile, tmp_path: Path) -> None:
    from qft.commands.train import train
    from qft.progress import View

    notes: list[str] = []

    class Told(View):
        def note(self, text: str) -> None:
            notes.append(text)

    rows = write_jsonl(tmp_path / "bad.jsonl", [*FINE, FINE[0], *FINE])
    settings = {"max_steps": 1, "gradient_accumulation_steps": 1, "save_strategy": "no", "report_to": []}
    train(load(recipe_file(data={"train": str(rows)}, train=settings)), Told())
    assert any(note.startswith("Rows: duplicates: 3 of 5 rows say what") for note in notes)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["data"]["findings"][0]["rows"] == 3


def test_looks_are_of_one_tokenizer() -> None:
    assert not Look(byte_tokenizer()).puts_bos
    assert Look(with_bos("", puts=True)).puts_bos
