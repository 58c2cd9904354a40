"""What a plan says of memory, and how it makes a training fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qft.commands.train import train
from qft.errors import OutOfMemoryError, RecipeError
from qft.machine.device import absent_gpu
from qft.memory.work import Step
from qft.plan import Plan, make_plan
from qft.plan.memory import Forecast, settled
from qft.progress import View
from qft.recipe import load
from tests.support.cli import qft
from tests.support.families import tiny
from tests.support.gguf import saved
from tests.support.models import tiny_llama
from tests.support.rows import chat, write_jsonl
from tests.support.runs import adapter, run

MakeRecipe = Callable[..., Path]
AUTO: dict[str, Any] = {
    "per_device_train_batch_size": "auto",
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing": "auto",
    "max_steps": 2,
    "report_to": [],
}


ONE_LAYER = {"target_modules": ["q_proj"]}


@pytest.fixture
def one_block(recipe_file: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    """Writes a recipe of a model of one block, with adapters on one layer."""
    base = saved(tiny_llama(num_hidden_layers=1), tmp_path / "one")
    return lambda **sections: recipe_file(model={"path": str(base)}, adapter=ONE_LAYER, **sections)


def planned(path: Path, *overrides: str, size: int = 2**33) -> Plan:
    return make_plan(load(path, overrides), absent_gpu(size))


def test_with_room_nothing_is_computed_again_and_the_micro_batch_is_the_step(one_block: MakeRecipe) -> None:
    plan = planned(one_block(train=AUTO))
    train = plan.recipe.train
    assert (train.micro_batch, train.gradient_accumulation_steps, train.gradient_checkpointing) == (4, 1, False)
    assert plan.training["per_device_train_batch_size"] == 4
    assert {way.rows * way.accumulated for way in plan.ways} == {4}
    assert plan.memory.fits
    assert plan.memory.predicted_peak_bytes == sum(plan.memory.components.values())


def test_the_fastest_way_within_the_budget_is_taken(one_block: MakeRecipe) -> None:
    path = one_block(train=AUTO | {"gradient_checkpointing": True})
    sizes = {way.rows: way.peak for way in planned(path).ways}
    for rows in (1, 2, 4):
        plan = planned(path, f"memory.budget={sizes[rows]}B")
        assert plan.recipe.train.micro_batch == rows
        assert plan.recipe.train.gradient_accumulation_steps == 4 // rows


def test_no_more_blocks_are_computed_again_than_must_be(recipe_file: MakeRecipe, tmp_path: Path) -> None:
    base = saved(tiny_llama(num_hidden_layers=4), tmp_path / "four")
    train = AUTO | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    path = recipe_file(model={"path": str(base)}, adapter=ONE_LAYER, train=train | {"kernels": "plain"})
    none, most = (planned(path, f"train.gradient_checkpointing={on}").memory for on in ("false", "true"))
    assert none.predicted_peak_bytes
    assert most.predicted_peak_bytes
    beside = planned(path).ways[0].peak - none.predicted_peak_bytes
    between = (none.predicted_peak_bytes + most.predicted_peak_bytes) // 2 + beside
    plan = planned(path, f"memory.budget={between}B")
    assert plan.memory.recomputed_blocks == 3
    assert plan.kept == ["inputs"] * 3 + ["all"]
    assert plan.recipe.train.gradient_checkpointing is True
    assert [way.recomputed for way in plan.ways if way.fits] == [3, 4]


def test_blocks_keep_as_much_as_may_be_spent(recipe_file: MakeRecipe, tmp_path: Path) -> None:
    """The dearest first: outputs of norms cost next to nothing to be made again, and are the first to go."""
    base = saved(tiny_llama(num_hidden_layers=4), tmp_path / "four")
    train = AUTO | {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    path = recipe_file(model={"path": str(base)}, train=train)
    least, most = (planned(path, f"train.gradient_checkpointing={on}") for on in ("true", "false"))
    peaks = [plan.memory.predicted_peak_bytes or 0 for plan in (least, most)]
    assert ({*least.kept}, {*most.kept}) == ({"inputs"}, {"all"})
    parts = (2**20, (peaks[1] - peaks[0]) // 2, 2**33)
    found = [planned(path, f"train.gradient_checkpointing={part}") for part in parts]
    assert "inputs" in found[0].kept
    assert [{*plan.kept} for plan in found[1:]] == [{"attention", "products"}, {"all"}]
    assert [plan.checkpoints for plan in found] == ["host", "host", None]
    assert [plan.recipe.train.gradient_checkpointing for plan in found] == [True, True, False]
    for plan, spent in zip(found, parts, strict=True):
        assert peaks[0] < (plan.memory.predicted_peak_bytes or 0) <= peaks[0] + spent
    within = planned(path, f"memory.budget={found[1].ways[0].peak}B")
    assert within.kept == found[1].kept


def test_what_cannot_fit_is_refused_with_what_helps(one_block: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"memory.budget: the training takes .* lower data.max_length"):
        planned(one_block(train=AUTO), "memory.budget=1MiB")


def test_sizes_that_were_not_traced_are_what_tracing_says(one_block: MakeRecipe) -> None:
    plan = planned(one_block(train=AUTO))
    forecast = Forecast(plan.model, plan.lora, plan.data, None)
    train = plan.recipe.train.having(per_device_train_batch_size="auto", gradient_accumulation_steps=12)
    model = dataclasses.replace(plan.model, loaded=plan.model.loaded.having(train=train))
    forecast = dataclasses.replace(forecast, model=model)
    for way in forecast.ways():
        assert way.peak == pytest.approx(
            forecast.predict(Step(forecast.batch(way.rows), "all", way.accumulated > 1)).taken, rel=0.001
        )
    assert [way.rows for way in forecast.ways()] == [12, 6, 4, 3, 2, 1]


def test_check_says_it_of_a_gpu_that_is_not_here(recipe_file: MakeRecipe) -> None:
    told = json.loads(qft("check", recipe_file(model={"device": "auto"}), "--gpu", "24GiB", "--json").stdout)["memory"]
    assert told["fits"]
    assert told["budget_bytes"] == int(24 * 2**30 * 90 / 100)
    assert told["predicted_peak_bytes"] == sum(told["components"].values()) >= max(told["peaks"].values())
    assert told["predicted_host_bytes"] > 2**26
    for size in ("24", "much", "0GiB"):
        refused = qft("check", recipe_file(), "--gpu", size)
        assert (refused.exit_code, "24GiB" in refused.stderr) == (2, True)
    on_cpu = qft("check", recipe_file(model={"device": "cpu"}), "--gpu", "24GiB")
    assert on_cpu.exit_code == 2
    assert "model.device" in on_cpu.stderr


def test_a_budget_may_be_in_bytes(recipe_file: MakeRecipe) -> None:
    for budget, size in ((2**30, 2**30), ("1GiB", 2**30), ("50%", 2**32), ("64GiB", 2**33)):
        assert planned(recipe_file(memory={"budget": budget})).memory.budget_bytes == size


@pytest.mark.parametrize("budget", ["0%", "101%", "24", "lots", "-1GiB", 0, -5])
def test_a_budget_is_a_share_or_a_size(budget: Any, recipe_file: MakeRecipe) -> None:
    refused = qft("check", recipe_file(memory={"budget": budget}))
    assert refused.exit_code == 2
    assert "memory.budget" in refused.stderr
    assert "24GiB" in refused.stderr


def test_what_blocks_keep_is_a_switch_or_a_size(recipe_file: MakeRecipe) -> None:
    refused = qft("check", recipe_file(train={"gradient_checkpointing": "lots"}))
    assert refused.exit_code == 2
    assert "or a size such as 8GiB" in refused.stderr.replace("\n", " ")


def test_an_interrupted_run_goes_on_in_the_same_micro_batches(recipe_file: MakeRecipe, tmp_path: Path) -> None:
    path = recipe_file(train=AUTO | {"save_strategy": "steps", "save_steps": 1})
    run(path)
    resumed = run_more(path)
    assert resumed == 4
    assert adapter(Path(load(path).recipe.output_dir))


def run_more(path: Path) -> int:
    """Goes on in a budget that the run's own micro-batches are not within; their rows."""
    loaded = load(path, ["train.max_steps=3", "memory.budget=1MiB"])
    train(loaded, View(), resume=True)
    written = load(Path(loaded.recipe.output_dir) / "recipe.yaml").recipe.train
    return written.micro_batch


def test_the_first_blocks_alone_are_checkpointed(recipe_file: MakeRecipe) -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    from qft.memory.checkpointing import checkpoint_first, enable_checkpointing
    from qft.model.adapter import attach_adapter
    from qft.model.load import load_base

    plan = make_plan(load(recipe_file(train={"gradient_checkpointing": True})))
    model: Any = attach_adapter(load_base(plan.model), plan)
    enable_checkpointing(model)
    checkpoint_first(model, 1)
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert [block.gradient_checkpointing for block in blocks] == [True, False]


def test_the_longest_batch_that_the_rows_make_is_predicted(recipe_file: MakeRecipe, tmp_path: Path) -> None:
    rows = [chat("q", "a" * length) for length in (3, 4, 90)]
    short, long = (write_jsonl(tmp_path / f"{n}.jsonl", rows[:n] * 4) for n in (2, 3))
    train = {"per_device_train_batch_size": 2}
    plans = [planned(recipe_file(data={"train": str(path)}, train=train)) for path in (short, long)]
    activations = [plan.memory.components["activations"] for plan in plans]
    assert activations[1] > 3 * activations[0]


def test_a_training_that_does_not_fit_is_refused_or_said_to_be_made_fit(recipe_file: MakeRecipe) -> None:
    class Notes(View):
        said: list[str]

        def note(self, text: str) -> None:
            self.said.append(text)

    path, view = recipe_file(train={"max_steps": 1}, memory={"budget": "64KiB"}), Notes()
    view.said = []
    with pytest.raises(
        OutOfMemoryError, match=r"memory.budget comes to .* lower data.max_length; or set memory.on_oom"
    ):
        train(load(path, ["memory.on_oom=fail"]), view)
    assert not Path(load(path).recipe.output_dir, "manifest.json").exists()
    train(load(path), view)
    assert any("predicted" in text and "smaller parts" in text for text in view.said)


def test_the_fused_optimizer_is_taken_where_there_is_room(recipe_file: MakeRecipe) -> None:
    plan = planned(recipe_file())
    assert plan.training["optim"] == plan.recipe.train.optim == "adamw_torch_fused"
    assert plan.memory.optimizer
    assert plan.memory.optimizer.startswith("adamw_torch_fused: its state takes")
    assert planned(recipe_file(), "train.optim=sgd").memory.optimizer is None


def test_the_one_of_the_smallest_state_is_taken_where_there_is_none(recipe_file: MakeRecipe) -> None:
    whole: dict[str, Any] = {"quant": None, "adapter": {"kind": "none", "r": ...}}
    fused, small = (
        planned(recipe_file(**whole), f"train.optim={optim}").memory.predicted_peak_bytes or 0
        for optim in ("adamw_torch_fused", "adamw_8bit")
    )
    assert small < fused
    beside = 600 * 2**20
    plan = planned(recipe_file(**whole), f"memory.budget={(small + fused) // 2 + beside}B")
    assert plan.training["optim"] == "adamw_8bit"
    assert plan.memory.fits
    assert "do not fit" in (plan.memory.optimizer or "")


def test_a_resumed_run_goes_on_with_its_optimizer(recipe_file: MakeRecipe) -> None:
    path = recipe_file(train={"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"})
    written = load(path).recipe.train
    loaded = settled(load(path, ["train.optim=auto"]), written)
    assert loaded.recipe.train.optim == "adamw_torch"


def test_inputs_of_blocks_on_the_host_are_not_on_the_device(
    recipe_file: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qft.memory.stash.LEAST", 0)
    base = saved(tiny_llama(num_hidden_layers=4), tmp_path / "four")
    train = {"gradient_checkpointing": True, "report_to": []}
    path = recipe_file(model={"path": str(base)}, adapter=ONE_LAYER, train=train)
    device, host = (planned(path, f"memory.checkpoints={place}") for place in ("device", "host"))
    assert (device.checkpoints, host.checkpoints) == ("device", "host")
    assert host.memory.peaks["head"] < device.memory.peaks["head"]
    with pytest.raises(RecipeError, match=r"memory\.checkpoints: the model runs on the CPU"):
        make_plan(load(path, ["memory.checkpoints=host"]))


def test_distilling_takes_what_the_learnt_tokens_take(recipe_file: MakeRecipe, tmp_path: Path) -> None:
    """Of rows as long, those with long answers; two models' logits of them are held in float32."""
    quant = {"preset": None, "mode": "qat", "target": "int4-g32", "distill": True}
    found = []
    for name, row in (("few", chat("x" * 80, "y")), ("many", chat("x", "y" * 80))):
        rows = write_jsonl(tmp_path / f"{name}.jsonl", [row] * 8)
        train = {"max_steps": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
        found.append(planned(recipe_file(quant=quant, train=train, data={"train": str(rows)})).memory)
    few, many = (memory.predicted_peak_bytes for memory in found)
    assert few
    assert many
    assert many - few > 2 * 8 * 79 * 264 * 4


def test_a_gpu_is_known_of_a_model_with_buffers_within_its_blocks(recipe_file: MakeRecipe, tmp_path: Path) -> None:
    base = saved(tiny("gemma3"), tmp_path / "base")
    assert planned(recipe_file(model={"path": str(base)}, train={"max_steps": 2})).memory.unknown is None
