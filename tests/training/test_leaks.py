"""What grows from step to step is found, with its name; and nothing is where nothing grows."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qft.commands.train import train
from qft.documents.memory import Leak
from qft.memory import leaks
from qft.memory.census import Census, holder, size_of, take_census
from qft.memory.leaks import LeakWatch, growth_per_100_steps
from qft.memory.meter import Snapshot
from qft.progress import Step, View
from qft.recipe import load
from qft.training.trainer import QftTrainer

RecipeFile = Callable[..., Path]
MIB = 2**20
STEPS = 12
SHORT = {"max_steps": STEPS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "report_to": []}


class Node:
    """Of a chain that no list holds."""

    def __init__(self, before: Node | None) -> None:
        self.before, self.values = before, np.ones(MIB // 8)


class Keeper(View):
    """Keeps something of each step, as `leak` says."""

    def __init__(self, leak: Callable[[Keeper, Step], None]) -> None:
        self.leak = leak
        self.kept: list[Any] = []
        self.cache: dict[int, Any] = {}
        self.last: Node | None = None
        self.module = Cached()
        self.total: Any = 0.0

    def step(self, step: Step) -> None:
        self.leak(self, step)


def keep_tensors(keeper: Keeper, step: Step) -> None:
    keeper.kept.append(torch.ones(MIB // 4))


def cache_arrays(keeper: Keeper, step: Step) -> None:
    keeper.cache[step.step] = {"values": np.ones(MIB // 8)}


def chain(keeper: Keeper, step: Step) -> None:
    keeper.last = Node(keeper.last)


CACHE: dict[int, Any] = {}


def list_floats(keeper: Keeper, step: Step) -> None:
    keeper.kept.extend(step.step + i / 2 for i in range(MIB // 32))


def list_one_again(keeper: Keeper, step: Step) -> None:
    keeper.kept.extend([None] * (MIB // 8))


class Cached(torch.nn.Module):
    """Keeps what it has computed, as a part of a model may."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, torch.Tensor] = {}


def cache_in_module(keeper: Keeper, step: Step) -> None:
    keeper.module.seen["rows", step.step] = torch.ones(MIB // 4)


def nothing(keeper: Keeper, step: Step) -> None:
    keeper.kept = [torch.ones(MIB // 4)]


def leak_of(path: Path, view: View) -> Leak | None:
    found = train(load(path), view).memory.leak
    gc.collect()
    return found


@pytest.mark.parametrize(
    ("leak", "suspect", "where"),
    [
        (keep_tensors, "growing list", "kept of Keeper"),
        (cache_arrays, "growing cache", "cache of Keeper"),
        (cache_in_module, "growing cache", "seen of Cached"),
        (list_floats, "growing list", "kept of Keeper"),
        (list_one_again, "growing list", "kept of Keeper"),
        (chain, "growing objects", f"{__name__}.Node"),
    ],
)
def test_a_planted_leak_is_found_and_named(
    leak: Callable[[Keeper, Step], None], suspect: str, where: str, recipe_file: RecipeFile
) -> None:
    found = leak_of(recipe_file(train=SHORT), Keeper(leak))
    assert found is not None
    assert (found.suspect, where in found.evidence) == (suspect, True), found
    assert found.bytes_per_100_steps == pytest.approx(100 * MIB, rel=0.15)  # lists have room for an eighth more


@pytest.mark.parametrize("summed", [False, True], ids=["kept in a list", "summed into one loss"])
def test_a_retained_graph_is_found(summed: bool, recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, plain = Keeper(nothing), QftTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = plain(self, model, inputs, *args, **kwargs)
        if model.training and summed:
            keeper.total = keeper.total + loss
        elif model.training:
            keeper.cache[len(keeper.cache)] = loss
        return loss

    monkeypatch.setattr(QftTrainer, "compute_loss", compute_loss)
    found = leak_of(recipe_file(train=SHORT, memory={"leak_threshold": "1MiB"}), keeper)
    assert found is not None
    assert found.suspect == "retained graph"
    assert "loss.detach()" in found.evidence
    assert ("cache of Keeper" in found.evidence) is not summed


def test_a_run_that_keeps_nothing_is_silent(recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def noted(step: int) -> Census:
        looks.append(step)
        return take_census(step)

    monkeypatch.setattr(leaks, "take_census", noted)
    heaps = iter(range(2**30, 2**40, 2**30))
    monkeypatch.setattr(leaks, "heap_in_use", lambda: next(heaps))  # so that it looks
    settings = SHORT | {"save_strategy": "steps", "save_steps": 3}
    assert leak_of(recipe_file(train=settings), Keeper(nothing)) is None
    assert looks == [4, 6, STEPS]


def test_the_threshold_is_the_recipes(recipe_file: RecipeFile) -> None:
    for threshold, is_found in (("90MiB", True), ("110MiB", False), (None, False)):
        path = recipe_file(train=SHORT, memory={"leak_threshold": threshold})
        report = train(load(path, ["output_dir=" + str(path.parent / str(threshold))]), Keeper(keep_tensors))
        assert (report.memory.leak is not None) is is_found
        assert report.memory.growing is is_found
        assert any("growing list" in line for line in report.advice) is is_found
        assert report.memory.leak_threshold_bytes == (threshold and int(threshold.removesuffix("MiB")) * MIB)


def snapshot(gpu: int) -> Snapshot:
    return Snapshot(True, gpu * MIB, gpu * MIB, 0)


def test_growth_on_a_gpu_that_nothing_explains_is_told() -> None:
    watch, still = LeakWatch(8 * MIB), LeakWatch(8 * MIB)
    for step in range(30):
        watch.look(snapshot(100 + step))
        still.look(snapshot(100 + 50 * (step > 15)))  # a workspace that comes late
    found = watch.leak(on_gpu=True)
    assert found is not None
    assert (found.suspect, found.bytes_per_100_steps) == ("unknown", 100 * MIB)
    assert still.leak(on_gpu=True) is None


def test_growth_is_told_from_jumps_and_noise() -> None:
    assert growth_per_100_steps([7 * step for step in range(90)]) == 700
    assert growth_per_100_steps([7 * step + 1000 * (step % 3 == 0) for step in range(90)]) == pytest.approx(700, abs=30)
    assert growth_per_100_steps([500 * (step > 40) for step in range(90)]) == 0
    assert growth_per_100_steps([min(step, 20) for step in range(90)]) == 0
    assert growth_per_100_steps([5] * 16) is None


def test_a_container_has_a_holder_and_bytes() -> None:
    assert holder(CACHE) == f"CACHE of module {__name__}"
    keeper = Keeper(nothing)
    assert holder(keeper.cache) == "cache of Keeper"
    assert holder([1]) == ""
    one = torch.ones(MIB // 4)
    assert size_of([one, one.view(-1)], set()) == pytest.approx(MIB, abs=200)  # two views of one storage
    assert size_of(Node(Node(None)), set()) == pytest.approx(2 * MIB, abs=2000)
    assert size_of([np, Node], set()) < 200
