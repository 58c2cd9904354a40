"""Whatever goes wrong is one message, with its exit code, in characters that a terminal can take."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors import SafetensorError

from qft.errors import ModelError
from tests.support.cli import qft
from tests.support.forked import command, ended
from tests.support.models import byte_tokenizer, tiny_llama
from tests.support.paths import ROOT
from tests.support.rows import chat, write_jsonl
from tests.support.tiny import write_tiny_model

RecipeFile = Callable[..., Path]


def shell(words: str) -> subprocess.CompletedProcess[bytes]:
    """`qft` in a process of its own, by a shell."""
    line = words.replace("qft ", f"{sys.executable} -m qft ")
    known = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], env=known, capture_output=True, check=False, timeout=300
    )


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """`qft check` as if that were raised somewhere in it."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("qft.commands.check.make_plan", fail)


def test_what_nobody_has_foreseen_is_one_line_and_a_file(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QFT_CACHE", str(tmp_path / "cache"))
    failing(monkeypatch, KeyError("\x1b[31mred\nand a second line"))
    found = qft("check", recipe_file())
    assert (found.exit_code, found.stdout) == (70, "")
    [line] = found.stderr.splitlines()
    assert line.startswith("error: `qft check`, in planned (commands/check.py:")
    assert "failed in a way that nobody has foreseen: KeyError: " in line
    assert "\x1b" not in line
    [kept] = (tmp_path / "cache").iterdir()
    assert str(kept) in line
    assert "Traceback" in kept.read_text()
    shown = qft("check", recipe_file(), "--debug")
    assert shown.exit_code == 70
    assert "Traceback" in shown.stderr


def test_without_a_place_for_the_traceback(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QFT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file" / "tmp"))
    failing(monkeypatch, ZeroDivisionError())
    found = qft("check", recipe_file())
    assert found.exit_code == 70
    assert "ZeroDivisionError; its traceback could not be written" in found.stderr


@pytest.mark.parametrize(
    ("number", "code", "text"),
    [
        (errno.ENOSPC, 7, "the disk is full"),
        (errno.EDQUOT, 7, "the quota of the disk is used up"),
        (errno.EROFS, 7, "the file system is read-only"),
        (errno.EACCES, 7, "permission is denied"),
        (errno.ENAMETOOLONG, 7, "the name is too long"),
        (errno.EISDIR, 7, "it is a folder"),
        (errno.ENOTDIR, 7, "a part of the path is a file"),
        (errno.EMFILE, 7, "too many files are open; raise the limit (`ulimit -n`)"),
        (errno.EIO, 7, "the disk fails to read or write"),
        (errno.ENOENT, 3, "No such file or directory"),
        (errno.ENOMEM, 9, "this machine has no memory left"),
    ],
)
def test_what_the_system_refuses_names_the_file(
    number: int, code: int, text: str, recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, OSError(number, os.strerror(number), "/some/[/b]/file"))
    found = qft("check", recipe_file())
    assert found.exit_code == code
    [line] = found.stderr.splitlines()
    assert "/some/[/b]/file: " in line
    assert text in line


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (MemoryError(), 9, "this machine has no memory left"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] can't allocate memory: 9 bytes"), 9, "no memory left"),
        (OSError(errno.ENOSPC, "No space left on device"), 7, "TMPDIR names another place"),
        (ModelError("m"), 6, "error: m\n"),
        (SafetensorError("HeaderTooLarge"), 6, "is damaged or cut off"),
        (UnpicklingError("invalid load key"), 7, "is damaged or cut off"),
        (torch.OutOfMemoryError("CUDA out of memory."), 9, "the device has no memory left: CUDA out of memory."),
        (OfflineModeIsEnabled("offline"), 3, "the hub cannot be reached"),
        (RuntimeError("One of the subprocesses has abruptly died during map operation."), 9, "set fewer data.num_proc"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 9, "no memory left, it seems: DataLo"),
        (RuntimeError("unable to open file <w> in read-only mode: Too many open files (24)"), 7, "`ulimit -n`"),
        (FileNotFoundError("No such file or directory: run/weights"), 3, "run/weights"),
        (OSError("TMPDIR is set to '/file' but it is not a directory."), 7, "cannot be written: TMPDIR is set to '/f"),
    ],
)
def test_what_a_library_is_known_to_raise(
    error: Exception, code: int, text: str, recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = RuntimeError("something went wrong")
    outer.__cause__ = error
    failing(monkeypatch, outer)
    found = qft("check", recipe_file())
    assert found.exit_code == code
    assert text in found.stderr


def test_a_variable_that_a_library_cannot_read_is_named(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(ValueError, match="yesterday") as raised:
        int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
    failing(monkeypatch, raised.value)
    found = qft("check", recipe_file())
    assert found.exit_code == 7
    assert "the environment variable SOURCE_DATE_EPOCH has a value that test_failures.py cannot read" in found.stderr
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    assert qft("check", recipe_file("other.yaml")).exit_code == 70, "it was not that"


@pytest.mark.parametrize("flag", ["-O", "-OO"])
def test_python_without_docstrings_is_named(flag: str) -> None:
    """What torch and transformers raise while they are imported so."""
    line = "from qft.cli.failures import explained; print(explained(ValueError('No docstring found for forward')))"
    known = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, flag, "-c", line], env=known, capture_output=True, text=True, check=True)
    assert ("PYTHONOPTIMIZE" in done.stdout) is (flag == "-OO")


def test_what_a_models_own_code_refuses_is_told_as_its_own(chat_file: Path, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "xmod", "xmod")
    refused = qft("eval", f"{model}@float32", "--data", chat_file)
    assert refused.exit_code == 6
    assert re.search(
        r"the model's own code fails on this \(modeling_xmod\.py:\d+\): .*language unknown", refused.stderr
    )
    assert "its traceback, for a report of the fault, is in " in refused.stderr


def test_data_and_exceptions_command_no_terminal(recipe_file: RecipeFile, tmp_path: Path) -> None:
    nasty = "\x1b]0;title\x07\x9b2J\r"
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [{"role": nasty, "content": "x"}]}])
    found = qft("check", recipe_file(data={"train": str(rows)}))
    assert found.exit_code == 5
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b") | {nasty: 1}] * 4)
    shown = qft("check", recipe_file(data={"train": str(rows)}))
    assert shown.exit_code == 0
    assert "nobody reads" in shown.stdout
    (tmp_path / "bad.jinja").write_text("{{ raise_exception('" + nasty + "') }}")
    refused = qft("check", recipe_file(data={"chat_template": "bad.jinja"}))
    assert refused.exit_code == 5
    for text in (found.stderr, shown.stdout, refused.stderr):
        assert not set(text) & set("\x1b\x07\x9b\r")
    assert "␛]0;title" in refused.stderr


def test_brackets_in_a_path_are_brackets(recipe_file: RecipeFile, tmp_path: Path) -> None:
    folder = tmp_path / "[/bold] [red]" / "a\\[b]" / "%s {0} :smile: ["
    folder.mkdir(parents=True)
    write_jsonl(folder / "[rows].jsonl", [chat("a", "b")] * 8)
    data = {"train": str(folder / "[rows].jsonl"), "eval_fraction": 0.3}
    shown = qft("train", recipe_file(data=data, output_dir=str(folder / "[run]")))
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert "[run]" in shown.stdout
    assert "[rows].jsonl" in qft("check", recipe_file(data=data)).stdout
    compared = qft("eval", f"{folder / '[run]'}@base", folder / "[run]", "--out", tmp_path / "out")
    assert compared.exit_code == 0, compared.stderr
    assert compared.stdout.replace("\n", "").count("[run]") >= 2


def test_a_terminal_of_few_characters(recipe_file: RecipeFile, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "réçé-日本.jsonl", [chat("a", "b")] * 4)
    recipe = recipe_file(data={"train": str(rows)})
    shown = ended(command("check", recipe, "--show", 1, "--json"), PYTHONIOENCODING="ascii")
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert json.loads(shown.stdout)["data"]["sources"][0]["path"] == str(rows)
    refused = ended(command("check", tmp_path / "日本.yaml"), PYTHONIOENCODING="ascii")
    assert refused.returncode == 3
    assert b"Traceback" not in refused.stderr


def test_a_closed_pipe_ends_quietly_and_ends_no_training(recipe_file: RecipeFile) -> None:
    done = shell("qft schema | head -1")
    assert (done.returncode, done.stderr) in [(141, b""), (0, b"")]
    reader, writer = os.pipe()
    os.close(reader)
    closed = ended(command("check", recipe_file()), stdout=writer)
    os.close(writer)
    assert (closed.returncode, closed.stderr) == (141, b"")
    reader, writer = os.pipe()
    os.close(reader)
    trained = ended(command("train", recipe_file()), stdout=writer)
    os.close(writer)
    assert trained.returncode == 0
    assert trained.stderr == b"\nnothing takes standard output any more (Broken pipe); the work goes on\n"
    full = shell("qft schema > /dev/full")
    assert full.returncode == 7
    assert re.fullmatch(rb"error: the disk is full[^\n]*\n", full.stderr)
    assert shell("qft schema >&-").returncode == 0


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, sys\nfrom qft.machine.streams import open_closed\nopen_closed()\n"
        "file = open(sys.argv[1], 'w')\nos.write(2, b'of a library')\nfile.write(str(file.fileno() > 2))"
    )
    line = f"{sys.executable} {tmp_path / 'mine.py'} {tmp_path / 'file'} <&- >&- 2>&-"
    subprocess.run(["bash", "-c", line], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert (tmp_path / "file").read_text() == "True"


def test_the_cache_is_blamed_and_not_the_data(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    monkeypatch.setattr("qft.data.sources.CACHE", tmp_path / "file" / "cache")
    done = qft("check", recipe_file())
    assert done.exit_code == 7
    assert str(tmp_path / "file") in done.stderr
    assert "HF_DATASETS_CACHE names another place" in done.stderr
    assert "chats.jsonl" not in done.stderr


def test_a_folder_that_is_gone_is_told(recipe_file: RecipeFile, tmp_path: Path) -> None:
    recipe, here = recipe_file(), tmp_path / "here"

    def work() -> None:
        here.mkdir()
        os.chdir(here)
        here.rmdir()
        command("check", recipe)()

    done = ended(work)
    assert done.returncode == 3
    assert done.stderr.startswith(b"error: the folder in which this command was started is not there any more")


def test_a_lack_of_memory_is_not_the_datas_fault(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise DatasetsError("An error occurred while generating the dataset") from MemoryError()

    monkeypatch.setattr("qft.data.sources.load_dataset", fail)
    done = qft("check", recipe_file())
    assert done.exit_code == 9
    assert f"{tmp_path / 'chats.jsonl'}: this machine has no memory left to read it" in done.stderr


class PanicException(BaseException):
    """As pyo3 raises it where a library in Rust gives up."""


def test_a_library_that_gives_up_is_one_message(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["continuing_subword_prefix"] = "x" * 3000  # longer than any of its tokens
    path.write_text(json.dumps(document))
    found = qft("check", recipe_file(model={"path": str(tmp_path / "model")}))
    assert found.exit_code == 6
    assert "its tokenizer cannot be loaded: range end index" in found.stderr
    failing(monkeypatch, PanicException("out of range"))
    found = qft("check", recipe_file())
    assert found.exit_code == 70
    assert "PanicException: out of range" in found.stderr


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_model_of_another_kind_is_named(kind: str, recipe_file: RecipeFile, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    config = {"model_type": kind, "architectures": [f"The{kind}"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    found = qft("check", recipe_file(model={"path": str(tmp_path / "model")}, quant=None))
    assert found.exit_code == 6
    assert f"The{kind} is not supported" in found.stderr


@pytest.mark.parametrize("damage", [lambda data: data[:-999], lambda data: b"\xff" * 64 + data[64:], lambda data: b""])
def test_damaged_weights_are_named(damage: Callable[[bytes], bytes], recipe_file: RecipeFile, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    recipe = recipe_file(model={"path": str(tmp_path / "model")}, quant=None)
    for words in (("train", recipe), ("chat", tmp_path / "model", "--prompt", "x", "--max-new-tokens", 2)):
        found = qft(*words)
        assert found.exit_code == 6, found.stderr
        assert str(tmp_path / "model") in found.stderr
