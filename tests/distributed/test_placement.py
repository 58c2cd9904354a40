"""How a training is put on several GPUs, and what it is refused."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]

from qft.distributed.asked import processes
from qft.distributed.world import Ranks, joined, ranks
from qft.errors import RecipeError, RunError
from qft.machine.device import absent_gpu
from qft.plan import Plan, make_plan
from qft.plan.gpus import plan_gpus
from qft.recipe import load
from tests.support.runs import run

RecipeFile = Callable[..., Path]
TWO, GIB = Ranks(0, 2, 0, 2), 2**30
TRAIN: dict[str, Any] = {"report_to": [], "gradient_accumulation_steps": 4}


def plan_of(path: Path, found: Ranks = TWO) -> Plan:
    return make_plan(load(path), found=found)


def test_processes_share_the_forward_passes_of_an_update(recipe_file: RecipeFile) -> None:
    alone, both = (plan_of(recipe_file(train=TRAIN), found) for found in (Ranks(), TWO))
    assert (alone.training["gradient_accumulation_steps"], both.training["gradient_accumulation_steps"]) == (4, 2)
    assert alone.recipe.train.gradient_accumulation_steps == both.recipe.train.gradient_accumulation_steps == 4
    assert alone.steps == both.steps
    assert (alone.placement.strategy, both.placement.strategy) == ("none", "ddp")


def test_a_global_batch_says_how_many_passes_there_are(recipe_file: RecipeFile) -> None:
    path = recipe_file(train={**TRAIN, "gradient_accumulation_steps": ...}, distributed={"global_batch": 12})
    assert plan_of(path).training["gradient_accumulation_steps"] == 3  # of two rows, by two processes
    with pytest.raises(RecipeError, match=r"yaml:\d+: distributed.global_batch: an update has 6 forward passes"):
        plan_of(path, Ranks(0, 4, 0, 4))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("train.gradient_accumulation_steps", 3, "which 2 GPUs cannot share; give a multiple of 2"),
        ("distributed.strategy", "none", "2 processes were started"),
        ("distributed.gpus", 4, "4, and 2 started on this machine"),
        ("distributed.nodes", 2, "2, and processes were started on 1"),
        ("memory.offload", "cpu", "on one GPU alone"),
        ("memory.on_oom", "fit", "set it to fail"),
        ("train.label_smoothing_factor", 0.1, "averaged by micro-batch"),
        ("train.stages", "[{max_steps: 1}, {max_steps: 1}]", "follow each other on one GPU"),
    ],
)
def test_what_several_cannot_do_is_refused(field: str, value: Any, text: str, recipe_file: RecipeFile) -> None:
    loaded = load(recipe_file(train=TRAIN), [f"{field}={value}"])
    with pytest.raises(RecipeError, match=rf"(yaml:\d+|--set {field}): {field}: .*{text}"):
        make_plan(loaded, found=TWO)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("quant.mode", "8bit", "do not shard"),
        ("quant.quant_storage", "uint8", "leaves the rest whole"),
        ("train.optim", "adamw_8bit", "adamw_torch_fused"),
        ("adapter.use_dora", "true", "ddp"),
        ("adapter.bias", "all", "ddp"),
    ],
)
def test_what_does_not_shard_is_refused(field: str, value: Any, text: str, recipe_file: RecipeFile) -> None:
    quant = {"preset": ..., "mode": "8bit"} if value == "8bit" else {}
    loaded = load(recipe_file(train=TRAIN, quant=quant, distributed={"strategy": "fsdp2"}), [f"{field}={value}"])
    with pytest.raises(RecipeError, match=rf"{field}: .*{text}"):
        make_plan(loaded, found=TWO)


def test_sharded_weights_are_packed_in_what_is_computed_in(recipe_file: RecipeFile) -> None:
    plan = plan_of(recipe_file(train=TRAIN, distributed={"strategy": "fsdp2"}))
    assert plan.model.scheme.config()["bnb_4bit_quant_storage"] == "bfloat16"
    assert plan.training["optim"] == "adamw_torch_fused"
    assert set(plan.kernels.values()) == {"weights are sharded (fsdp2)"}


@pytest.mark.parametrize("found", [TWO, None], ids=["two", "alone"])
@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("USE_FSDP", "true", "distributed.strategy"),
        ("USE_DEEPSPEED", "yes", "distributed.strategy"),
        ("DYNAMO_BACKEND", "inductor", "train.torch_compile"),
        ("USE_CPU", "maybe", "model.device"),
        ("TORCH_DEVICE", "cuda:1", "model.device"),
    ],
)
def test_variables_that_contradict_are_refused(
    name: str, value: str, field: str, found: Ranks | None, recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(RecipeError, match=rf"{field}: .*variable ACCELERATE_{name}"):
        make_plan(load(recipe_file(train=TRAIN)), found=found)


@pytest.mark.parametrize("name", ["LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"])
def test_a_process_alone_looks_for_no_others(
    name: str, recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "2")
    for other in ("MASTER_ADDR", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(other, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)  # of a training before, in this process
    assert run(recipe_file()).resumed_from == []
    assert os.environ[name] == "2"


def test_one_process_is_started_where_only_one_can_do_it(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    path = recipe_file(train={**TRAIN, "gradient_accumulation_steps": 12}, model={"device": "auto"})
    assert processes(load(path)) == 6
    assert processes(load(path, ["distributed.gpus=2"])) == 2
    assert processes(load(path, ["distributed.strategy=none"])) == 1
    assert processes(load(path, ["memory.offload=cpu"])) == 1
    assert processes(load(path, ["model.device=cpu"])) == 1
    with pytest.raises(RecipeError, match=r"distributed.nodes: .* by torchrun"):
        processes(load(path, ["distributed.nodes=2"]))


def test_ranks_are_those_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks() is None
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    for name, value in (variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    assert ranks() == Ranks(5, 8, 1, 4)
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(RunError, match="RANK=8"):
        ranks()


@pytest.mark.parametrize(
    ("half", "text"),
    [
        ({"RANK": "0"}, "WORLD_SIZE=, "),
        ({"WORLD_SIZE": "2"}, "RANK=, WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
    ],
)
def test_half_of_the_variables_is_no_training_alone(
    half: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in half.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=text):
        ranks()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("RANK", raising=False)
    assert ranks() is None


def test_a_port_that_another_listens_at_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(RunError, match=r"rank 0 of 2 listens at 127.0.0.1:\d+ .* in vain"), joined(TWO, "cpu", 60):
            pass


def test_check_says_what_each_of_several_gpus_takes(recipe_file: RecipeFile) -> None:
    path = recipe_file(model={"device": "auto"}, train={**TRAIN, "gradient_accumulation_steps": 8})
    plan, told = plan_gpus(load(path), absent_gpu(GIB), 4, 2)
    ddp, fsdp2 = told.placements
    assert (told.chosen, plan.placement.size, ddp.accumulated, ddp.steps) == ("ddp", 8, 1, 2)
    trained = plan.model.shape.trainable_parameters * 4
    assert (ddp.reduced_bytes, fsdp2.reduced_bytes) == (trained * 7 // 8 * 2, trained * 7 // 8)
    assert ddp.gathered_bytes == 0 < (fsdp2.gathered_bytes or 0)
    assert fsdp2.load_bytes
    assert fsdp2.load_bytes < (ddp.load_bytes or 0)
    assert ddp.fits is fsdp2.fits is True
    assert plan.memory.components["gradient_buckets"] == trained
    assert "gradients" not in plan.memory.components  # which lie in them
    small = plan_gpus(load(path), absent_gpu(GIB // 2), 4, 2)[1]
    assert [way.fits for way in small.placements] == [False, False]  # CUDA alone takes more
    eight = plan_gpus(load(path, ["quant.preset=null", "quant.mode=8bit"]), absent_gpu(GIB), 4, 2)[1]
    assert "do not shard" in (eight.placements[1].cannot or "")
    assert eight.chosen == "ddp"
