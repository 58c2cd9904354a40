"""quant.mode qat, end to end: what it learns, from when on it rounds, and what it learns from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax, nll_loss

from qft.commands.train import train
from qft.data.template import IGNORED
from qft.errors import ModelError, RecipeError
from qft.model.load import load_base
from qft.model.rounded import read_state, round_weights
from qft.model.target import load_target, parse_target
from qft.plan import make_plan
from qft.recipe import load
from tests.support.models import plain_loss
from tests.support.rows import chat, write_jsonl
from tests.support.runs import HARD, Leaves, adapter, run

RecipeFile = Callable[..., Path]
FLOAT = {"dtype": "float32"}


def qat(target: str = "int4-g32", **more: Any) -> dict[str, Any]:
    return {"preset": None, "mode": "qat", "target": target, **more}


@pytest.mark.parametrize(
    ("target", "kind"),
    [("int4-g32", "lora"), ("w8a8", "lora"), ("nf4", "none"), ("q4_0", "lora"), ("q4_0", "none")],
)
def test_it_learns_and_what_is_evaluated_later_is_what_was_trained(
    target: str, kind: str, recipe_file: RecipeFile, chat_file: Path, tmp_path: Path
) -> None:
    settings = {"kind": "none", "r": ...} if kind == "none" else {}
    train = HARD | ({"learning_rate": 3e-3} if kind == "none" else {})
    path = recipe_file(quant=qat(target), adapter=settings, model=FLOAT, train=train, data={"eval": str(chat_file)})
    report = run(path)
    assert (report.model.scheme, report.model.quant_type, report.model.quantized_share) == ("qat", target, 1.0)
    assert report.loss.last < 0.9 * report.loss.first
    assert report.eval.after is not None
    found = parse_target(str(tmp_path / "run"), adapter=None, data=None)
    model = load_target(found, found.plan())
    assert plain_loss(model, make_plan(load(path)).data.eval) == pytest.approx(report.eval.after.loss, rel=1e-4)


def losses(path: Path) -> list[float]:
    return [loss for _, loss, *_ in run(path).loss.history]


def test_rounding_begins_when_it_is_asked_to(recipe_file: RecipeFile, tmp_path: Path) -> None:
    train = HARD | {"max_steps": 5, "per_device_train_batch_size": 2}

    def of(name: str, quant: dict[str, Any]) -> list[float]:
        return losses(recipe_file(quant=quant, model=FLOAT, train=train, output_dir=str(tmp_path / name)))

    plain = of("plain", {"preset": None, "mode": "none"})
    late = of("late", qat(fake_quant_after_steps=3))
    early = of("early", qat())
    assert late[:3] == pytest.approx(plain[:3], rel=1e-4)
    assert abs(early[0] - plain[0]) > 1e-3
    assert abs(late[3] - plain[3]) > 1e-3


@pytest.mark.parametrize(
    "quant",
    [
        qat(fake_quant_after_steps=3),
        qat("w8a8-static", freeze_observers_after_steps=5, learn_scales=True, fake_quant_after_steps=1),
    ],
    ids=["int4-g32", "learnt"],
)
def test_a_resumed_run_is_the_unbroken_one(quant: dict[str, Any], recipe_file: RecipeFile, tmp_path: Path) -> None:
    """It rounds from the same step on, by the same scales and ranges."""
    settings = HARD | {"max_steps": 6, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}

    def recipe(name: str) -> Path:
        return recipe_file(quant=quant, train=settings, output_dir=str(tmp_path / name))

    train(load(recipe("whole")), Leaves(tmp_path / "whole", {5: "parts"}))
    assert run(recipe("parts"), resume=True).resumed_from == [4]
    whole, parts = adapter(tmp_path / "whole"), adapter(tmp_path / "parts")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    states = [read_state(tmp_path / name / "adapter") for name in ("whole", "parts")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    if quant.get("learn_scales"):
        changes = [tensor for name, tensor in states[0].items() if name.endswith("weight_scale_change")]
        assert len(changes) == 14
        assert all(tensor.abs().max() > 0 for tensor in changes)


def test_the_range_of_activations_is_frozen(recipe_file: RecipeFile, tmp_path: Path) -> None:
    """Of all steps up to then, and of none behind."""
    steady = HARD | {"lr_scheduler_type": "constant", "per_device_train_batch_size": 2}

    def ranges(name: str, steps: int, freeze: int) -> dict[str, torch.Tensor]:
        quant = qat("w8a8-static", freeze_observers_after_steps=freeze, fake_quant_after_steps=1)
        run(recipe_file(quant=quant, train=steady | {"max_steps": steps}, output_dir=str(tmp_path / name)))
        return read_state(tmp_path / name / "adapter")

    two, frozen, five = ranges("two", 2, 9), ranges("frozen", 5, 2), ranges("five", 5, 9)
    assert all(name.endswith(".input_largest") for name in two), "scales of weights are not learnt"
    assert all(torch.equal(two[name], frozen[name]) for name in two)
    assert all((two[name] <= five[name]).all() for name in two)
    assert any((two[name] < five[name]).all() for name in two)


def test_a_range_that_nobody_learnt_is_no_range(recipe_file: RecipeFile, tmp_path: Path) -> None:
    run(recipe_file(quant=qat(), train=HARD | {"max_steps": 1}))
    recipe = recipe_file(quant=qat("w8a8-static"), output_dir=str(tmp_path / "other"))
    found = parse_target(str(recipe), adapter=tmp_path / "run" / "adapter", data=None)
    with pytest.raises(ModelError, match="range of its activations from no training"):
        load_target(found, found.plan())


def test_distilling_learns_the_unrounded_models_predictions(recipe_file: RecipeFile, tmp_path: Path) -> None:
    """The first loss is the divergence of the rounded base from the base, over the learnt tokens of the whole step;
    with a share, so much of it, and the rest the loss of the tokens."""
    rows = write_jsonl(tmp_path / "uneven.jsonl", [chat("count", " ".join(map(str, range(n)))) for n in (2, 9, 4, 20)])
    train = HARD | {"max_steps": 20, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}

    def recipe(distill: bool | float, steps: int = 20) -> Path:
        settings = train | {"learning_rate": 3e-3, "max_steps": steps}
        name = str(tmp_path / f"run-{distill}")
        return recipe_file(
            quant=qat(distill=distill), model=FLOAT, data={"train": str(rows)}, train=settings, output_dir=name
        )

    path = recipe(True)
    plan = make_plan(load(path))
    base, rounded = load_base(plan.model).eval(), load_base(plan.model).eval()
    round_weights(rounded, plan.model)
    total, tokens, nll = 0.0, 0, 0.0
    for row in plan.data.train:
        ids, at = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:]) != IGNORED
        with torch.no_grad():
            old, new = (log_softmax(model(input_ids=ids).logits[0, :-1][at], -1) for model in (base, rounded))
        total, tokens = total + float(kl_div(new, old, reduction="sum", log_target=True)), tokens + int(at.sum())
        nll += float(nll_loss(new, torch.tensor(row["labels"][1:])[at], reduction="sum"))
    found = losses(path)
    assert found[0] == pytest.approx(total / tokens, rel=1e-3)
    assert found[-1] < 0.7 * found[0]
    assert losses(recipe(0.25, steps=1))[0] == pytest.approx((0.25 * total + 0.75 * nll) / tokens, rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quant.target=null"], r"quant\.target: quant\.mode qat needs the format"),
        (["adapter.lora_dropout=0.1"], r"adapter\.lora_dropout: .*set it to 0"),
        (["quant.target=nvfp4", "quant.learn_scales=true"], r"quant\.learn_scales: the scales of nvfp4 follow"),
        (["quant.learn_scales=true", "memory.offload=cpu"], r"quant\.learn_scales: .*memory\.offload to none"),
        (["quant.freeze_observers_after_steps=3"], r"quant\.freeze_observers_after_steps: .*w8a8-static"),
        (["quant.distill=true", "adapter.bias=all"], r"adapter\.bias: .*set it to none"),
        (["quant.distill=true", "train.label_smoothing_factor=0.1"], r"train\.label_smoothing_factor: .*set it to 0"),
        (["quant.skip_modules=auto", "quant.skip_budget_bits=1"], r"quant\.skip_modules: auto .*qat"),
        (["calibrate.preset=w4a16"], r"calibrate: .*`qft export` writes; remove the section"),
        (["export.merge_into=original"], r"export\.merge_into: .*qat"),
        (["quant.mode=4bit"], r"quant\.target: has a meaning only with quant\.mode qat"),
        (["adapter.init_lora_weights=pissa"], r"adapter\.init_lora_weights: pissa"),
        (["train.torch_compile=true"], r"train\.torch_compile: "),
    ],
    ids=str,
)
def test_contradictions_are_refused(overrides: list[str], message: str, recipe_file: RecipeFile) -> None:
    with pytest.raises(RecipeError, match=message):
        load(recipe_file(quant=qat()), overrides)


def test_the_plan_tells_it(recipe_file: RecipeFile) -> None:
    path = recipe_file(quant=qat(fake_quant_after_steps=3, distill=True), model=FLOAT, train=HARD)
    told = make_plan(load(path)).document().quantization
    words = "qat for int4-g32, rounded in float32, from step 4 on, distilled from itself unrounded, not lm_head"
    assert (told.scheme, told.described, told.quantized_share) == ("qat", words, 1.0)


def test_rounding_that_never_begins_is_refused(recipe_file: RecipeFile) -> None:
    with pytest.raises(RecipeError, match=r"quant\.fake_quant_after_steps: 12, and the training has 12 steps"):
        make_plan(load(recipe_file(quant=qat(fake_quant_after_steps=12), train=HARD)))


def test_distilling_needs_an_adapter(recipe_file: RecipeFile) -> None:
    with pytest.raises(RecipeError, match=r"quant\.distill: .*set adapter\.kind to lora"):
        load(recipe_file(quant=qat(distill=True), adapter={"kind": "none", "r": ...}))


def test_groups_of_16_are_those_of_nvfp4(recipe_file: RecipeFile) -> None:
    with pytest.raises(RecipeError, match=r"calibrate\.group_size: 16 is nvfp4's"):
        load(recipe_file(calibrate={"engine": "rtn", "group_size": 16}))
