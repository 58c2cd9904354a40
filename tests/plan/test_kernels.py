"""train.kernels in the plan: what is to be fused, and each reason why something is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qft.errors import RecipeError
from qft.machine.device import absent_gpu
from qft.plan import Plan, make_plan
from qft.recipe import load
from tests.support.architectures import write_model
from tests.support.cli import qft
from tests.support.tiny import write_tiny_model

PRODUCTS, OTHERS = ("MLPs", "linear layers"), ("norms", "rotary positions")


@pytest.fixture
def one_block(recipe_file: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe of a model of one block."""
    base = write_model(tmp_path / "one", "llama", num_hidden_layers=1)
    return lambda **sections: recipe_file(model={"path": str(base)}, **sections)


def planned(path: Path, *overrides: str, capability: str | None = None) -> Plan:
    return make_plan(load(path, overrides), replace(absent_gpu(2**33), capability=capability))


def test_all_is_fused_on_a_gpu_and_nothing_without_one(recipe_file: Callable[..., Path]) -> None:
    path = recipe_file(train={"per_device_train_batch_size": 16})
    plan = planned(path)
    assert plan.document().kernels == dict.fromkeys((*PRODUCTS, *OTHERS))
    fused, plain = (made.memory.predicted_peak_bytes or 0 for made in (plan, planned(path, "train.kernels=plain")))
    assert fused < plain
    assert set(make_plan(load(path)).kernels.values()) == {"the kernels are for a GPU"}


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"adapter": {"lora_dropout": 0.1}}, "adapter.lora_dropout is 0.1"),
        ({"adapter": {"use_dora": True}}, "adapter.use_dora"),
        ({"quant": {"preset": ..., "mode": "8bit"}}, "weights held as 8bit"),
        ({"quant": {"preset": ..., "mode": "4bit", "compute_dtype": "float32"}}, "products are in float32"),
        ({"train": {"bf16": False}}, "LoRA is computed in float32"),
        ({"memory": {"offload": "cpu"}}, "memory.offload is cpu"),
        ({"adapter": {"kind": "none", "r": ...}, "quant": None}, "all weights are trained"),
    ],
)
def test_what_is_more_than_w_a_and_b_is_multiplied_by_its_own_code(
    sections: dict[str, Any], reason: str, one_block: Callable[..., Path]
) -> None:
    path = one_block(**sections)
    kernels = planned(path).kernels
    assert all(reason in (kernels[kind] or "") for kind in PRODUCTS)
    assert [kernels[kind] for kind in OTHERS] == [None, None]
    with pytest.raises(RecipeError, match=r"train\.kernels: MLPs, linear layers cannot be fused: .*set it to auto"):
        planned(path, "train.kernels=fused")


def test_compiling_and_plain_fuse_nothing(one_block: Callable[..., Path]) -> None:
    path = one_block(quant=None)
    assert set(planned(path, "train.torch_compile=true").kernels.values()) == {
        "train.torch_compile makes kernels of its own"
    }
    assert set(planned(path, "train.kernels=plain").kernels.values()) == {"train.kernels is plain"}


def test_where_they_are_demanded_a_cpu_is_refused_with_the_line(recipe_file: Callable[..., Path]) -> None:
    done = qft("check", str(recipe_file(train={"kernels": "fused"})))
    assert done.exit_code == 2
    assert "train.kernels: MLPs, linear layers, norms, rotary positions cannot be fused" in " ".join(
        done.output.split()
    )


def test_products_in_float8_are_planned_where_they_are_asked_for(one_block: Callable[..., Path]) -> None:
    plan = planned(one_block(), "train.matmul=fp8", capability="9.0")
    assert plan.document().kernels == dict.fromkeys((*PRODUCTS, *OTHERS, "products in float8"))
    assert plan.memory.predicted_peak_bytes


@pytest.mark.parametrize(
    ("sections", "capability", "reason"),
    [
        ({}, "8.9", r"\(compute capability 8\.9\) is older than Hopper"),
        (
            {"train": {"bf16": False, "fp16": True}, "quant": {"compute_dtype": "float16"}},
            "9.0",
            "and these to float16",
        ),
        ({"train": {"kernels": "plain"}}, "9.0", "train.kernels is plain"),
        ({"adapter": {"lora_dropout": 0.1}}, "9.0", "adapter.lora_dropout is 0.1"),
        ({"quant": {"preset": ..., "mode": "8bit"}}, "9.0", "weights held as 8bit"),
        ({"adapter": {"kind": "none", "r": ...}, "quant": None}, "9.0", "all weights are trained"),
    ],
)
def test_where_float8_is_not_to_be_had_it_is_refused(
    sections: dict[str, Any], capability: str, reason: str, one_block: Callable[..., Path]
) -> None:
    path = one_block(**sections | {"train": sections.get("train", {}) | {"matmul": "fp8"}})
    with pytest.raises(RecipeError, match=rf"train\.matmul: fp8 is not to be had: .*{reason}.*; set it to 16bit"):
        planned(path, capability=capability)


def test_float8_on_a_cpu_is_refused_with_the_line(recipe_file: Callable[..., Path]) -> None:
    done = qft("check", str(recipe_file(train={"matmul": "fp8"})))
    assert done.exit_code == 2
    assert "train.matmul: fp8 is not to be had: the kernels are for a GPU; set it to 16bit" in " ".join(
        done.output.split()
    )


@pytest.mark.parametrize("kind", ["qwen3_next", "deepseek_v32", "openai-gpt"])
def test_what_a_model_takes_on_a_gpu_is_known(kind: str, recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """Of norms with a gate beside their input, attention that computes with its mask, blocks that return a list."""
    base = write_tiny_model(tmp_path / "base", kind)
    plan = planned(recipe_file(model={"path": str(base), "device": ...}, quant={"allow_partial": True}))
    assert plan.memory.unknown is None
    assert plan.kernels["norms"] is None


def test_a_model_without_a_stack_of_blocks_keeps_its_own_code(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "hrm_text")
    kernels = planned(recipe_file(model={"path": str(base), "device": ...}, quant={"allow_partial": True})).kernels
    assert all("has no list of" in (reason or "") for reason in kernels.values())


def test_a_model_that_cannot_compute_its_blocks_again_keeps_all(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    model = {"path": str(write_tiny_model(tmp_path / "base", "ctrl")), "device": ...}
    for asked in (True, "1GiB"):
        with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: train.gradient_checkpointing: .*; set it to false"):
            planned(recipe_file(model=model, train={"gradient_checkpointing": asked}))
    [way] = planned(recipe_file(model=model, train={"gradient_checkpointing": "auto"})).ways
    assert not way.recomputed
