"""Hub datasets by configuration, split, revision and columns, from a hub of our own on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from qft.data.prepare import prepare
from qft.data.sources import open_source
from qft.errors import DataError, MissingError, QftError
from qft.recipe import Source
from qft.recipe.data import DataSection
from tests.support.hub import COMMITS, ask_hub, serving_hub
from tests.support.models import byte_tokenizer
from tests.support.rows import write_jsonl

SPLITS = ("train", "validation")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """With the dataset org/rows of two configurations, and others of which something is wrong."""
    root = tmp_path_factory.mktemp("hub")
    for revision in ("main", "v2"):
        folder = root / "datasets/org/rows" / revision
        folder.mkdir(parents=True)
        for split in SPLITS:
            rows = [{"ask": f"{split} {i}", "say": revision} for i in range(3)]
            write_jsonl(folder / f"{split}.jsonl", rows)
        files = [{"split": split, "path": f"{split}.jsonl"} for split in SPLITS]
        configs = [{"config_name": name, "data_files": files} for name in ("small", "other")]
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    for file, text in (("broken/main/train.jsonl", '{"a": 1}\n{"a": '), ("script/main/script.py", "raise SystemExit")):
        path = root / "datasets/org" / file
        path.parent.mkdir(parents=True)
        path.write_text(text)
    with serving_hub(root) as address:
        yield address


@pytest.fixture(autouse=True)
def _asked(hub: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ask_hub(hub, tmp_path / "cache", monkeypatch)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def test_rows_are_those_of_the_split_the_revision_and_the_columns() -> None:
    found = {}
    for split in SPLITS:
        source = {"path": "org/rows", "name": "small", "split": split, "revision": "v2"}
        source["columns"] = {"ask": "prompt", "say": "completion"}  # type: ignore[assignment]
        rows = prepare(DataSection.model_validate({"train": source, "max_length": 64}), byte_tokenizer(), 0)
        assert rows.place(0, 1) == "org/rows: row 2"
        assert rows.sources[0].digest == COMMITS["v2"]
        found[split] = [byte_tokenizer().decode(ids) for ids in rows.train["input_ids"]]
    for split, texts in found.items():
        assert len(texts) == 3
        assert all(f"{split} {i}" in text and "v2" in text for i, text in enumerate(texts))


def test_a_branch_that_has_moved_is_another_set(monkeypatch: pytest.MonkeyPatch) -> None:
    source, digests = Source(path="org/rows", name="small"), []
    for commit in ("1" * 40, "2" * 40):
        monkeypatch.setitem(COMMITS, "main", commit)
        rows = open_source(source)
        digests.append((rows.digest, rows.dataset[0]["say"]))
    assert digests == [("1" * 40, "main"), ("2" * 40, "v2")]


WRONG: dict[str, tuple[dict[str, str], type[QftError], str]] = {
    "no such dataset": ({"path": "org/none"}, MissingError, "'org/none' doesn't exist on the Hub"),
    "gated": ({"path": "org/gated"}, MissingError, "gated dataset"),
    "no configuration": ({}, MissingError, r"\['small', 'other'\]: set the source's name"),
    "another": ({"name": "large"}, MissingError, r"'large' not found.*\['small', 'other'\]: set the source's name"),
    "no such split": (
        {"name": "small", "split": "test"},
        MissingError,
        r'split "test".*\[\'train\', \'validation\'\]: set the source\'s split',
    ),
    "no such revision": ({"name": "small", "revision": "v9"}, MissingError, "'v9' doesn't exist.*set .* revision"),
    "code": ({"path": "org/script"}, MissingError, "scripts are no longer supported"),
    "no JSON": ({"path": "org/broken"}, DataError, "cannot be read: JSON parse error: Invalid value"),
}


@pytest.mark.parametrize(("source", "kind", "reason"), WRONG.values(), ids=WRONG)
def test_what_is_not_there_is_told_with_what_is(source: dict[str, str], kind: type[QftError], reason: str) -> None:
    with pytest.raises(kind, match=reason) as caught:
        open_source(Source.model_validate({"path": "org/rows", **source}))
    assert str(caught.value).startswith(source.get("path", "org/rows"))
    assert "\n" not in str(caught.value)


def test_a_column_that_is_not_there_is_told() -> None:
    source = {"path": "org/rows", "name": "small", "columns": {"question": "prompt"}}
    with pytest.raises(DataError, match="org/rows: none of its first 100 rows has a field question to rename"):
        prepare(DataSection.model_validate({"train": source, "max_length": 64}), byte_tokenizer(), 0)


def test_without_the_hub_what_was_fetched_is_read_and_the_rest_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(path="org/rows", name="other")
    with serving_hub(tmp_path) as address:  # and is no more
        pass
    online = open_source(source)
    ask_hub(address, tmp_path / "cache", monkeypatch)
    away = open_source(source)
    assert (away.digest, away.dataset.to_list()) == (online.digest, online.dataset.to_list())
    with pytest.raises(MissingError, match=r"org/else: .*Couldn't reach.*: try again, or set HF_HUB_OFFLINE=1"):
        open_source(Source(path="org/else"))
