"""train.kernels in the plan: what is to be fused, and each reason why something is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qft.errors import RecipeError
from qft.machine.device import absent_gpu
from qft.plan import Plan, make_plan
from qft.recipe import load
from tests.support.cli import qft

PRODUCTS, OTHERS = ("MLPs", "linear layers"), ("norms", "rotary positions")


def planned(path: Path, *overrides: str) -> Plan:
    return make_plan(load(path, overrides), absent_gpu(2**33))


def test_all_is_fused_on_a_gpu_and_nothing_without_one(recipe_file: Callable[..., Path]) -> None:
    path = recipe_file()
    plan = planned(path)
    assert plan.document().kernels == dict.fromkeys((*PRODUCTS, *OTHERS))
    fused, plain = (made.memory.predicted_peak_bytes or 0 for made in (plan, planned(path, "train.kernels=plain")))
    assert fused < plain
    assert set(make_plan(load(path)).kernels.values()) == {"the kernels are for a GPU"}


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["adapter.lora_dropout=0.1"], "adapter.lora_dropout is 0.1"),
        (["adapter.use_dora=true"], "adapter.use_dora"),
        (["quant.mode=8bit"], "weights held as 8bit"),
        (["quant.compute_dtype=float32"], "products are in float32"),
        (["train.bf16=false"], "LoRA is computed in float32"),
        (["memory.offload=cpu"], "memory.offload is cpu"),
        (["adapter.kind=none", "quant.mode=none"], "all weights are trained"),
    ],
)
def test_what_is_more_than_w_a_and_b_is_multiplied_by_its_own_code(
    overrides: list[str], reason: str, recipe_file: Callable[..., Path]
) -> None:
    path = recipe_file(quant={"preset": ..., "mode": "4bit", "compute_dtype": "bfloat16"}, adapter={"r": ...})
    path.write_text(path.read_text().replace("  compute_dtype: bfloat16\n", "") if "4bit" not in str(overrides) else "")
    kernels = planned(path, *overrides).kernels
    assert all(reason in (kernels[kind] or "") for kind in PRODUCTS)
    assert [kernels[kind] for kind in OTHERS] == [None, None]
    with pytest.raises(RecipeError, match=r"train\.kernels: MLPs, linear layers cannot be fused: .*set it to auto"):
        planned(path, *overrides, "train.kernels=fused")


def test_compiling_and_plain_fuse_nothing(recipe_file: Callable[..., Path]) -> None:
    path = recipe_file(quant=None)
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
