"""What a model's files hash to: their bytes, whatever they are called, read once while nothing about them changes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qft.checkpoint import digest as module
from qft.checkpoint.digest import digest
from qft.errors import DamagedError
from qft.files import sha256


def real(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed; every size and age is remembered."""
    found: list[str] = []

    def counted(path: Path) -> str:
        found.append(path.name)
        return sha256(path)

    monkeypatch.setattr(module, "sha256", counted)
    monkeypatch.setattr(module, "LARGE", 1)
    monkeypatch.setattr(module, "SETTLED", -1.0)
    monkeypatch.setenv("QFT_CACHE", str(tmp_path / "cache"))
    return found


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


def blob(folder: Path, name: str, content: bytes, repository: str = "models--org--tiny") -> Path:
    """A file of a snapshot in the hub's cache, whose blob has that name and content."""
    path = folder / repository / "snapshots" / ("1" * 40) / "model.safetensors"
    held = folder / repository / "blobs" / name
    for each in (path, held):
        each.parent.mkdir(parents=True, exist_ok=True)
    held.write_bytes(content)
    path.symlink_to(os.path.relpath(held, path.parent))
    return path


def sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def test_a_file_is_read_once(weights: Path, readings: list[str]) -> None:
    link = weights.with_name("link")
    link.symlink_to(weights)
    assert [digest(weights), digest(weights), digest(link)] == [real(weights)] * 3
    assert readings == ["model.safetensors"]


def flip_in_place(path: Path) -> None:
    """One bit, with the times of before."""
    before = path.stat()
    with path.open("r+b") as stream:
        byte = stream.read(1)[0]
        stream.seek(0)
        stream.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_with_other(path: Path) -> None:
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"w8ights")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(path)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"!")


@pytest.mark.parametrize("change", [flip_in_place, replace_with_other, grow])
def test_what_changed_is_read_again(change: Callable[[Path], None], weights: Path, readings: list[str]) -> None:
    before = digest(weights)
    change(weights)
    assert digest(weights) == real(weights) != before
    assert len(readings) == 2


def forge(entry: Path) -> None:
    (entry / "digest.json").write_text(json.dumps("0" * 64))


def empty(entry: Path) -> None:
    (entry / "digest.json").write_text("")


def unsummed(entry: Path) -> None:
    (entry / "sha256.json").unlink()


@pytest.mark.parametrize("harm", [forge, empty, unsummed])
def test_a_damaged_entry_is_not_believed(harm: Callable[[Path], None], weights: Path, readings: list[str]) -> None:
    digest(weights)
    [entry] = (weights.parent / "cache" / "sha256").iterdir()
    harm(entry)
    assert digest(weights) == digest(weights) == real(weights)
    assert len(readings) == 2


@pytest.mark.parametrize("setting", ["LARGE", "SETTLED"])
def test_small_files_and_fresh_ones_are_always_read(
    setting: str, weights: Path, readings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, setting, 1000)
    assert [digest(weights), digest(weights)] == [real(weights)] * 2
    assert len(readings) == 2
    assert not (weights.parent / "cache").exists()


def test_nothing_is_remembered_where_the_cache_is_off(
    weights: Path, readings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for where in ("off", str(weights / "below")):
        monkeypatch.setenv("QFT_CACHE", where)
        assert [digest(weights), digest(weights)] == [real(weights)] * 2
    assert len(readings) == 4


@pytest.mark.parametrize("kind", ["sha256", "git", "sha1"])
def test_a_whole_blob_of_the_hub_is_hashed_like_any_file(kind: str, tmp_path: Path) -> None:
    content = b"the weights of the hub"
    names = {"sha256": hashlib.sha256(content).hexdigest(), "git": sha1(b"blob 22\0" + content), "sha1": sha1(content)}
    path = blob(tmp_path, names[kind], content)
    assert digest(path) == real(path)


@pytest.mark.parametrize("length", [64, 40])
def test_a_damaged_blob_of_the_hub_is_told_with_its_file(length: int, tmp_path: Path) -> None:
    name = (hashlib.sha256 if length == 64 else hashlib.sha1)(b"what the hub has").hexdigest()
    path = blob(tmp_path, name, b"what the disk has")
    with pytest.raises(DamagedError) as raised:
        digest(path)
    assert str(path) in str(raised.value)
    assert f"remove {path.resolve()}" in str(raised.value)
    assert raised.value.exit_code == 4


def test_a_name_outside_the_hubs_cache_says_nothing(tmp_path: Path) -> None:
    """Other stores call files by other hashes."""
    for number, repository in enumerate(("store", "datasets--org--rows")):
        path = blob(tmp_path / str(number), "a" * 64, b"other bytes", repository)
        assert digest(path) == real(path)
    odd = blob(tmp_path / "etag", "W-etag", b"of another server")
    assert digest(odd) == real(odd)
