"""Hub models and datasets, against a hub of our own on this machine: the real client, over real HTTP."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import close_session, constants

from qft.checkpoint.find import find_checkpoint
from qft.errors import DamagedError
from qft.recipe import load
from tests.support.cli import qft
from tests.support.hub import COMMITS, ask_hub, serving_hub
from tests.support.models import tiny_llama
from tests.support.rows import chat, write_jsonl


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[str]:
    """Address of a hub with the model org/tiny, and the dataset org/rows in two revisions."""
    import shutil

    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_model, root / "models/org/tiny/main")
    shutil.copytree(tiny_model, root / "models/org/tiny/v2")
    pickled = root / "models/org/pickled/main"
    shutil.copytree(tiny_model, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    sharded = root / "models/org/sharded/main"
    tiny_llama().save_pretrained(sharded, max_shard_size="200KB")
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        shutil.copyfile(tiny_model / "model.safetensors", sharded / name)
    for revision, answer in (("main", "first"), ("v2", "second")):
        folder = root / "datasets/org/rows" / revision
        for split in ("train", "validation"):
            (folder / "small").mkdir(parents=True, exist_ok=True)
            write_jsonl(folder / "small" / f"{split}.jsonl", [chat(f"{split}", answer)] * 4)
        configs = {
            "config_name": "small",
            "data_files": [
                {"split": "train", "path": "small/train.jsonl"},
                {"split": "validation", "path": "small/validation.jsonl"},
            ],
        }
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': [configs]})}---\n")
    with serving_hub(root) as address:
        yield address


def recipe_of(folder: Path) -> Path:
    write_jsonl(folder / "rows.jsonl", [chat("a", "b")] * 4)
    recipe = {
        "model": {"path": "org/tiny", "device": "cpu"},
        "data": {"train": "rows.jsonl", "max_length": 64},
        "output_dir": "run",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.fixture
def cache(hub: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the hub's client, which reads its environment once, keeps what it fetches from our hub."""
    ask_hub(hub, tmp_path / "cache", monkeypatch)
    return tmp_path / "cache"


def check(folder: Path, *overrides: str) -> tuple[int, str, str]:
    """Exit code and output of `qft check --json` of a recipe for the hub's model."""
    ran = qft("check", recipe_of(folder), "--json", *(word for text in overrides for word in ("--set", text)))
    return ran.exit_code, ran.stdout, ran.stderr


def test_a_revision_is_resolved_to_its_commit(cache: Path, tmp_path: Path) -> None:
    code, out, err = check(tmp_path, "model.revision=v2")
    assert code == 0, err
    assert json.loads(out)["model"]["commit"] == COMMITS["v2"]
    # Nothing is loaded, so nothing as large as weights is fetched.
    assert list(cache.rglob("tokenizer.json"))
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("model.path=org/gated", 3, "is gated"),
        ("model.path=org/missing", 3, "neither a file here nor a hub model"),
        ("model.revision=v9", 3, "has no revision v9"),
        ("model.path=org/pickled", 6, "are pickled"),
    ],
)
def test_what_the_hub_cannot_give_is_one_clear_message(
    override: str, code: int, message: str, cache: Path, tmp_path: Path
) -> None:
    found, out, err = check(tmp_path, override)
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_only_the_files_that_are_read_are_fetched(cache: Path, tmp_path: Path) -> None:
    fetched = {}
    for path in ("org/sharded", "org/tiny"):
        checkpoint = find_checkpoint(load(recipe_of(tmp_path), [f"model.path={path}"]).recipe)
        assert not checkpoint.has_weights
        assert checkpoint.with_weights().has_weights
        fetched[path] = [file.name for file in checkpoint.weight_files()]
    shards = fetched["org/sharded"]
    assert len(shards) > 1
    assert all(name.startswith("model-0000") for name in shards)
    assert fetched["org/tiny"] == ["model.safetensors"]
    assert {path.name for path in cache.rglob("*.safetensors")} == {*shards, "model.safetensors"}


def test_without_a_network_a_hub_model_is_reported_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    ran = qft("check", recipe_of(tmp_path))
    assert ran.exit_code == 3
    assert "org/tiny is not on this machine" in ran.stderr


def test_a_damaged_file_in_the_cache_is_told_and_fetched_anew_as_told(cache: Path, tmp_path: Path) -> None:
    def hashed() -> dict[str, str]:
        return find_checkpoint(load(recipe_of(tmp_path)).recipe).with_weights().base().sha256

    whole = hashed()
    [file] = cache.rglob("model.safetensors")
    blob = file.resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    with pytest.raises(DamagedError, match=r"model\.safetensors: is damaged in the hub's cache"):
        hashed()
    blob.unlink()
    assert hashed() == whole


def test_a_hub_dataset_is_read_by_configuration_split_and_revision(cache: Path, tmp_path: Path) -> None:
    counts = {}
    for split, revision in (("train", "main"), ("validation", "main"), ("validation", "v2")):
        source = f"data.train={{path: org/rows, name: small, split: {split}, revision: {revision}}}"
        code, out, err = check(tmp_path, source)
        assert code == 0, err
        [facts] = json.loads(out)["data"]["sources"]
        assert facts["rows"] == 4
        counts[split, revision] = (facts["tokens"], facts["supervised_tokens"])
    assert len(set(counts.values())) == 3
    code, _, err = check(tmp_path, "data.train={path: org/rows, name: large}")
    assert code == 3
    assert "large" in err


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "nonsense://127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used_is_told(
    proxy: str, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_hub(hub, tmp_path / "cache", monkeypatch)
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.setenv("NO_PROXY", "")
    close_session()  # which has read the variables
    try:
        found = qft("check", recipe_of(tmp_path))
    finally:
        close_session()
    if importlib.util.find_spec("socksio") is None or proxy.startswith("nonsense"):
        assert found.exit_code == 3, found.output
        assert "model.path: org/tiny is not on this machine, and the hub cannot be reached: " in found.stderr
