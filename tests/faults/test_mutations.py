"""Files that something went wrong with: each command ends well, or in one message with a documented exit code.

QFT_FUZZ says how many of each kind are tried; `make fuzz` tries 2,500. A failure names its seed, for QFT_FUZZ_FROM.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from typer.testing import Result

from qft.gguf.file import write_gguf
from qft.progress import Step, View
from qft.recipe import load
from tests.support.cli import qft
from tests.support.gguf import saved
from tests.support.models import CHATML, tiny_llama
from tests.support.mutations import mutated_bytes, mutated_json, spoil, spoil_one
from tests.support.once import once
from tests.support.rows import chat, write_jsonl
from tests.support.runs import trained
from tests.support.versions import artifact

COUNT = int(os.environ.get("QFT_FUZZ", "12"))
FROM = int(os.environ.get("QFT_FUZZ_FROM", "0"))
DOCUMENTED = {0, 2, 3, 4, 5, 6, 7, 8, 9, 10}
LONGEST = 60
"""Seconds of a command."""
MOST = 2**30
"""Bytes that a kind's commands may leave behind in the process."""
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
ROWS: list[dict[str, Any]] = [
    chat("say it", "it is") | {"system": "be brief", "id": 3},
    {"prompt": "2+2=", "completion": "4", "history": [["1+1=", "2"]]},
    {"instruction": "add", "input": "2 and 2", "output": "4", "chat_template_kwargs": {}},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 1}], "tools": [TOOL]},
    {"text": "plain text"},
]
Act = Callable[[Path, Path, random.Random], Result]
"""In a folder that has its own copy of what is to be spoiled; all else is read of the good one, which comes second."""


class _Cut(View):
    def step(self, step: Step) -> None:
        if step.step == 3:
            raise KeyboardInterrupt


def _recipe(folder: Path, good: Path, **sections: Any) -> Path:
    """Reads what is good, where it is not told otherwise."""
    values: dict[str, Any] = {
        "model": {"path": str(good / "model"), "device": "cpu"},
        "quant": {"preset": "finetune"},
        "adapter": {"r": 4, "target_modules": ["q_proj"]},
        "data": {"train": str(good / "few.jsonl"), "max_length": 128},
        "train": {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "report_to": []},
        "output_dir": "new",
    }
    values["train"] |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its GGUF file, rows, a template, a finished run, one that was cut off, and a registry."""

    def make(folder: Path) -> None:
        saved(tiny_llama(), folder / "model")
        write_jsonl(folder / "few.jsonl", [chat(f"say {i}", f"it is {i}") for i in range(4)])
        (folder / "own.jinja").write_text(CHATML)
        write_gguf(folder / "model", folder / "model.gguf", kind="f16")
        trained(folder, folder / "model", adapter={"r": 4, "target_modules": ["q_proj"]}, train={"max_steps": 2})
        from qft.commands.train import train

        with pytest.raises(KeyboardInterrupt):
            train(load(_recipe(folder, folder, output_dir="cut")), _Cut())
        artifact(folder / "out")
        qft("models", "add", "m", folder / "out", "--registry", folder / "models")

    return once(tmp_path_factory, "mutations", make)


def _rows(folder: Path, good: Path, draw: random.Random) -> Result:
    kept = draw.choice(ROWS)
    write_jsonl(folder / "rows.jsonl", [kept] * 3)
    spoil(folder / "rows.jsonl", draw)
    policy = draw.choice(["stop", "skip"])
    recipe = _recipe(folder, good, data={"train": "rows.jsonl", "on_bad_row": policy})
    return qft("check", recipe, "--show", "1", *draw.choice([[], ["--json"]]))


def _recipes(folder: Path, good: Path, draw: random.Random) -> Result:
    path = _recipe(folder, good, calibrate={"preset": "w4a16"}, export={"target": ["merged"]})
    if draw.random() < 0.6:
        path.write_text(yaml.safe_dump(mutated_json(yaml.safe_load(path.read_text()), draw)))
    else:
        path.write_bytes(mutated_bytes(path.read_bytes(), draw))
    return qft("check", path)


def _templates(folder: Path, good: Path, draw: random.Random) -> Result:
    path = folder / "own.jinja"
    path.write_bytes(mutated_bytes(path.read_bytes(), draw))
    return qft("check", _recipe(folder, good, data={"chat_template": "own.jinja"}))


def _models(folder: Path, good: Path, draw: random.Random) -> Result:
    spoil_one(folder / "model", draw)
    if draw.random() < 0.5:
        return qft("check", _recipe(folder, good, model={"path": "model"}))
    return qft("eval", folder / "model", "--data", good / "few.jsonl", "--out", folder / "eval")


def _ggufs(folder: Path, good: Path, draw: random.Random) -> Result:
    path = folder / "model.gguf"
    path.write_bytes(mutated_bytes(path.read_bytes(), draw))
    return qft("check", _recipe(folder, good, model={"path": "model.gguf"}))


def _runs(folder: Path, good: Path, draw: random.Random) -> Result:
    run = folder / "run"
    spoil_one(run, draw)
    commands = [("report", run), ("report", "--verify", run), ("eval", run, "--out", folder / "eval"),
                ("export", run, "--to", "adapter"), ("chat", run, "--prompt", "hi", "--max-new-tokens", "2"),
                ("models", "add", "n", good / "out", "--run", run, "--registry", folder / "models")]  # fmt: skip
    return qft(*draw.choice(commands))


def _checkpoints(folder: Path, good: Path, draw: random.Random) -> Result:
    spoil_one(folder / "cut", draw)
    return qft("train", _recipe(folder, good, output_dir="cut"), "--resume")


def _registries(folder: Path, good: Path, draw: random.Random) -> Result:
    spoil_one(folder / "models", draw)
    command = draw.choice([("list",), ("show", "m"), ("verify", "m"), ("promote", "m", "v1"), ("rollback", "m")])
    return qft("models", *command, "--registry", folder / "models")


KINDS: dict[str, tuple[Act, str | None]] = {
    "rows": (_rows, None),
    "recipes": (_recipes, None),
    "templates": (_templates, "own.jinja"),
    "models": (_models, "model"),
    "GGUF files": (_ggufs, "model.gguf"),
    "runs": (_runs, "run"),
    "checkpoints": (_checkpoints, "cut"),
    "registries": (_registries, "models"),
}
"""Each with the name of what it spoils, where that is not written anew."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_what_went_wrong_is_one_message(kind: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    act, spoiled = KINDS[kind]
    gc.collect()
    gc.freeze()  # what the fixtures left, which each command would look through
    before, wrong = psutil.Process().memory_info().rss, []
    for seed in range(FROM, FROM + COUNT):
        folder = tmp_path / str(seed)
        folder.mkdir()
        if spoiled:
            copy = shutil.copytree if (good / spoiled).is_dir() else shutil.copy
            copy(good / spoiled, folder / spoiled)
        monkeypatch.chdir(folder)
        started = time.monotonic()
        try:
            result = act(folder, good, random.Random(f"{kind} {seed}"))
        except Exception as error:
            wrong.append(f"{kind} {seed}: {type(error).__name__}: {error}"[:300])
            continue
        finally:
            monkeypatch.chdir(tmp_path)
            shutil.rmtree(folder)
        if (
            result.exit_code not in DOCUMENTED
            or "Traceback" in result.stderr
            or (result.exit_code and not result.stderr)
        ):
            wrong.append(f"{kind} {seed}: {result.exit_code}: {result.stderr[-300:]}")
        if (seconds := time.monotonic() - started) > LONGEST:
            wrong.append(f"{kind} {seed}: took {seconds:.0f} s")
    if (grown := psutil.Process().memory_info().rss - before) > MOST:
        wrong.append(f"{kind}: {grown:,} bytes are left")
    assert not wrong, "\n".join(wrong)
