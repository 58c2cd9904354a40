"""One process at a time in a folder, by real processes; and what killed ones leave behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, TextIO

import pytest

from qft.errors import BusyError
from qft.files import atomic_file, atomic_folder, process_start, temporary_name, write_json
from qft.run.lock import HELD, LOCK, Holder, locked, release_room, require_free
from tests.support.forked import fork


@dataclass
class Started:
    """A process that holds a folder, or was told that it is busy, and says which."""

    process: ForkProcess
    words: TextIO

    def said(self) -> str:
        return self.words.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.words.close()


def hold(folder: Path, go: Path, more: Sequence[str]) -> None:
    while not go.exists():
        time.sleep(0.001)
    try:
        with locked(folder, "qft train"):
            if "fork" in more and not os.fork():
                time.sleep(20)
            with atomic_folder(folder / "model") as whole, atomic_file(folder / "report.json"):
                (whole / "weights").write_text("half")
                sys.stdout.write("held\n")
                sys.stdout.flush()
                time.sleep(60)
    except BusyError:
        sys.stdout.write("busy\n")
        sys.stdout.flush()


def start(folder: Path, *more: str, go: Path | None = None) -> Started:
    ours, its = os.pipe()
    with Path(os.devnull).open() as nothing:
        process = fork(lambda: hold(folder, go or folder.parent, more), stdin=nothing, stdout=its, stderr=2)
    os.close(its)
    return Started(process, os.fdopen(ours))


@contextmanager
def held(folder: Path, *more: str) -> Iterator[int]:
    """By another process, which is killed afterwards; yields its id."""
    started = start(folder, *more)
    try:
        assert started.said() == "held"
        assert started.process.pid
        yield started.process.pid
    finally:
        started.kill()


def test_a_living_holder_is_named_and_nothing_of_its_is_touched(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held(folder) as number:
        before = sorted(folder.iterdir())
        with pytest.raises(BusyError) as caught, locked(folder, "qft calibrate"):
            raise AssertionError
        text = str(caught.value)
        assert f"`qft train` (process {number} on {socket.gethostname()}, since 20" in text
        assert caught.value.exit_code == 10
        with pytest.raises(BusyError):
            require_free(folder)
        assert sorted(folder.iterdir()) == before
        assert len(before) == 3


@pytest.mark.parametrize("more", [(), ("fork",)])
def test_a_killed_holder_is_followed_and_its_leftovers_go(tmp_path: Path, more: tuple[str, ...]) -> None:
    folder = tmp_path / "run"
    with held(folder, *more):
        pass
    assert (folder / LOCK).exists()
    assert len([*folder.iterdir()]) == 3
    with locked(folder, "qft train"):
        assert [path.name for path in folder.iterdir()] == [LOCK]
    assert not folder.exists() or not [*folder.iterdir()]


def test_of_several_started_at_once_one_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for round_ in range(2):
        go = tmp_path / f"go{round_}"
        started = [start(folder, go=go) for _ in range(4)]
        go.touch()
        answers = [each.said() for each in started]
        for each in started:
            each.kill()
        assert sorted(answers) == ["busy"] * 3 + ["held"]


def test_nothing_is_left_of_a_lock_whether_the_work_ends_well_or_not(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with locked(folder, "qft train"):
        assert (folder / LOCK).stat().st_size > 2**16
        release_room(folder)
        assert (folder / LOCK).stat().st_size < 2**10
    with pytest.raises(ValueError, match="fell"), locked(folder, "qft train"):
        raise ValueError("fell")
    assert not (tmp_path / "a").exists()
    with locked(folder, "qft train"):
        (folder / "report.json").touch()
    assert [path.name for path in folder.iterdir()] == ["report.json"]


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that knows no locks."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", refuse)


def holder(**changes: Any) -> str:
    own = Holder(
        command="qft train",
        pid=os.getpid(),
        host=socket.gethostname(),
        process_started=process_start(os.getpid()) or 0,
        since="2026-01-31T12:00:00+00:00",
    )
    return json.dumps(own.model_dump() | changes) + "\n"


@pytest.mark.usefixtures("no_flock")
def test_without_the_systems_locks_the_file_decides(tmp_path: Path) -> None:
    with locked(tmp_path / "run", "qft train"):
        with pytest.raises(BusyError, match=f"process {os.getpid()} .* delete .*{HELD}"):
            require_free(tmp_path / "run")
        with pytest.raises(BusyError, match=f"process {os.getpid()} "), locked(tmp_path / "run", "qft train"):
            raise AssertionError
        assert (tmp_path / "run" / HELD).exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_flock")
@pytest.mark.parametrize(
    ("changes", "taken"),
    [({"pid": 2**22 + 1}, True), ({"process_started": 1.0}, True), ({"host": "elsewhere"}, False), ({}, False)],
)
def test_without_the_systems_locks_a_stale_file_is_told(tmp_path: Path, changes: dict[str, Any], taken: bool) -> None:
    (tmp_path / HELD).write_text(holder(**changes))
    if not taken:
        with pytest.raises(BusyError), locked(tmp_path, "qft train"):
            raise AssertionError
    else:
        with locked(tmp_path, "qft train"):
            pass
        assert [*tmp_path.iterdir()] == []


def test_what_is_not_known_to_be_a_leftover_stays(tmp_path: Path) -> None:
    names = [".merged.qft-notes", ".git", "qft-1-1-abcdefgh", ".merged.abcdefgh", temporary_name("of a living process")]
    for name in names:
        (tmp_path / name).mkdir()
    with locked(tmp_path, "qft export"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_what_a_killed_process_had_moved_aside_is_put_back(tmp_path: Path) -> None:
    for name in ("merged", "adapter"):
        (tmp_path / f".{name}.qft-old-{2**22 + 1}-1-abcdefgh").mkdir()
        (tmp_path / f".{name}.qft-old-{2**22 + 1}-1-abcdefgh" / "old").touch()
    (tmp_path / "adapter").mkdir()
    with locked(tmp_path, "qft export"):
        pass
    there = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert there == ["adapter", "merged", "merged/old"]


def test_a_long_name_has_a_temporary_one_that_is_not_longer(tmp_path: Path) -> None:
    final = tmp_path / ("ä" * 127)
    with atomic_folder(final) as folder:
        (folder / "new").touch()
    with atomic_folder(final):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [final.name]
    assert [*final.iterdir()] == []


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_who_may_read_is_as_the_umask_says(mask: int, file_mode: int, folder_mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_json(tmp_path / "report.json", {})
        with atomic_folder(tmp_path / "adapter") as folder:
            (folder / "weights").touch(0o600)  # as safetensors does, whoever may read the rest
            (folder / "config").touch(0o666)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    files = dict.fromkeys(("report.json", "weights", "config"), file_mode)
    assert modes == files | {"adapter": folder_mode}


def test_a_file_in_the_place_of_a_folder_stays_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(NotADirectoryError) as caught, atomic_folder(tmp_path / "adapter"):
        raise AssertionError
    assert caught.value.filename == str(tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
