"""train.stages: each goes on from what the last came to, and what was cut off comes to what an unbroken run does."""

from __future__ import annotations

import io
import os
import shutil
import signal
import weakref
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

import qft.training.session
from qft.commands.train import train
from qft.data.encoded import read_rows
from qft.documents.training import Report, read_report
from qft.errors import Interrupted, RunError
from qft.export import export
from qft.model.load import load_base
from qft.model.rounded import read_state
from qft.model.target import load_target, parse_target
from qft.plan import make_plan
from qft.progress import View
from qft.quant.rounding import Integer
from qft.recipe import load
from qft.run.folder import Run
from qft.views.html.page import training_page
from qft.views.terminal.training import render
from tests.support.exports import options
from tests.support.models import plain_loss
from tests.support.once import once
from tests.support.rows import chat, write_jsonl
from tests.support.runs import Leaves, adapter, run

RecipeFile = Callable[..., Path]
FLOAT = {"dtype": "float32"}
DOWN = [
    {"quant.mode": "none", "max_steps": 3},
    {"quant.mode": "8bit", "max_steps": 2},
    {"quant.mode": "4bit", "max_steps": 3},
]
ROUNDED = {"quant.mode": "qat", "quant.target": "w8a8-static", "quant.learn_scales": True}
FULL = {
    "model": FLOAT,
    "adapter": {"kind": "none", "r": ..., "lora_dropout": ...},
    "train": {
        "learning_rate": 1e-3,
        "save_steps": 1,
        "save_total_limit": None,
        "eval_strategy": "epoch",
        "stages": [
            {"quant.mode": "none", "max_steps": 2},
            ROUNDED | {"quant.fake_quant_after_steps": 1, "reset_optimizer": True, "max_steps": 2},
            ROUNDED | {"learning_rate": 5e-4, "max_steps": 1},
        ],
    },
}


def write(folder: Path, base: Path, name: str = "part", **sections: Any) -> Path:
    """A recipe of rows of many lengths, with dropout, for the run folder of that name."""
    rows = [chat(f"count {n}", " ".join(map(str, range(n)))) for n in (1, 9, 2, 12, 5)]
    wanted: dict[str, Any] = {
        "model": {"path": str(base), "device": "cpu"},
        "adapter": {"r": 4, "lora_dropout": 0.2},
        "data": {"train": str(write_jsonl(folder / "uneven.jsonl", rows)), "max_length": 128},
        "train": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 1e-2},
        "output_dir": str(folder / name),
    }
    wanted["data"]["eval"] = str(write_jsonl(folder / "held.jsonl", rows[:2]))
    wanted["train"] |= {"report_to": [], "save_strategy": "steps", "save_steps": 2, "stages": DOWN}
    for section, values in sections.items():
        wanted[section] = {n: v for n, v in (wanted.get(section, {}) | values).items() if v is not ...}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(wanted))
    return path


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> RecipeFile:
    return partial(write, tmp_path, tiny_model)


@pytest.fixture(scope="session")
def down(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The finished run of DOWN."""
    return once(tmp_path_factory, "stages", lambda folder: run(write(folder, tiny_model, "down"))) / "down"


class Cut(View):
    """Ends the process, as it were, at the first event that is told so, or sends it a signal."""

    def __init__(self, at: str, sends: int | None = None) -> None:
        self.at, self.sends, self.told = at, sends, list[str]()

    def note(self, text: str) -> None:
        self.told.append(text)
        if self.at in text and self.sends:
            os.kill(os.getpid(), self.sends)
        elif self.at in text:
            raise KeyboardInterrupt

    def step(self, step: Any) -> None:
        self.note(f"made {step.step}")


def cut(path: Path, moment: str, *, resume: bool, sends: int | None = None) -> None:
    with pytest.raises(Interrupted if sends else KeyboardInterrupt):
        train(load(path), Cut(moment, sends), resume=resume)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    whole = folder / "model" / "model.safetensors"
    return load_file(whole) if whole.exists() else adapter(folder)


def text_of(drawn: Any) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(drawn)
    return console.file.getvalue()  # type: ignore[attr-defined]


def assert_same(whole: Report, resumed: Report) -> None:
    """All that is learnt and measured, but for time and memory."""
    assert resumed.loss == whole.loss
    assert resumed.eval == whole.eval
    for one, other in zip(whole.stages, resumed.stages, strict=True):
        timed = {"throughput", "peak_bytes"}
        assert other.model_dump(exclude=timed) == one.model_dump(exclude=timed)
    for name, tensor in weights(Path(whole.run)).items():
        torch.testing.assert_close(tensor, weights(Path(resumed.run))[name], rtol=0, atol=0)


MOMENTS = {
    "made 3": None,
    "made 3.": signal.SIGTERM,
    "step 3: held-out": None,
    "for stage 2 of 3": None,
    "Evaluating": None,
    "made 6": None,
}
"""Of a chain, in which each part is cut off at the next: in a stage's last step, at its end by a signal, in the
evaluation that this has left, while the next is loaded, in its first evaluation, in the first step of the third."""


def test_a_run_that_is_cut_off_anywhere_comes_to_the_same(recipe: RecipeFile, down: Path) -> None:
    path = recipe()
    for number, (moment, sends) in enumerate(MOMENTS.items()):
        cut(path, moment.rstrip("."), resume=number > 0, sends=sends)
    resumed = run(path, resume=True)
    assert resumed.resumed_from == [2, 3, 3, 3, 3, 5]
    assert_same(read_report(down), resumed)


def test_all_weights_go_on_to_be_rounded(recipe: RecipeFile, tmp_path: Path) -> None:
    """By scales and ranges that are learnt, from where rounding begins to the last stage, and as it is exported."""
    whole = train(load(recipe("whole", **FULL)), Leaves(tmp_path / "whole", {3: "part"}))
    path = recipe(**FULL)
    cut(path, "made 5", resume=True)
    resumed = run(path, resume=True)
    assert_same(whole, resumed)
    learnt = [read_state(Path(report.run) / "model") for report in (whole, resumed)]
    assert learnt[0].keys() == learnt[1].keys()
    assert all(torch.equal(tensor, learnt[1][name]) for name, tensor in learnt[0].items())
    name = "model.layers.1.mlp.up_proj"
    checkpoints = [Path(whole.run) / "checkpoints" / f"checkpoint-{step}" for step in (3, 4)]
    weight, before = load_file(checkpoints[0] / "model.safetensors")[f"{name}.weight"], read_state(checkpoints[1])
    assert torch.equal(learnt[0][f"{name}.weight_scale"], Integer(8).scales(weight))  # rounding begins with step 4
    assert before[f"{name}.weight_scale_change"].abs().max() > 0
    assert learnt[0][f"{name}.input_largest"] >= before[f"{name}.input_largest"] > 0
    [document] = export(Path(resumed.run), options("compressed-tensors"), View())
    checks = {check.name: check.value for check in document.gate.checks}
    assert document.passed
    assert (checks["different_weights"], checks["different_input_scales"], checks["largest_difference"]) == (0, 0, 0)
    target = parse_target(resumed.run, adapter=None, data=None)
    assert whole.eval.after
    loss = plain_loss(load_target(target, target.plan()), make_plan(load(path)).data.eval)
    assert loss == pytest.approx(whole.eval.after.loss, rel=1e-4)


def test_one_report_tells_of_each(down: Path) -> None:
    report, manifest = read_report(down), Run(down).manifest()
    schemes = [stage.model.scheme for stage in report.stages if stage.model]
    assert (schemes, report.model.scheme, report.steps) == (["none", "8bit", "4bit"], "4bit", 8)
    assert [(stage.first_step, stage.last_step) for stage in report.stages] == [(1, 3), (4, 5), (6, 8)]
    assert (report.stages[0].before, report.stages[-1].after) == (report.eval.before, report.eval.after)
    assert [stage.after for stage in report.stages[:-1]] == report.eval.history
    for one, other in pairwise(report.stages):
        assert one.after
        assert other.before
        assert one.after.step == other.before.step == one.last_step
        assert one.after.loss != other.before.loss  # on another base
        assert one.after.loss == pytest.approx(other.before.loss, rel=0.05)
    assert [point for stage in report.stages if stage.loss for point in stage.loss.history] == report.loss.history
    assert manifest
    assert [told.partition(":")[0] for told in manifest.stages] == ["1 to 3", "4 to 5", "6 to 8"]
    assert "6 to 8" in text_of(render(report))
    assert "Stages, held-out losses" in training_page(report)


def test_the_last_one_is_what_is_evaluated_later(down: Path) -> None:
    target = parse_target(str(down), adapter=None, data=None)
    plan, report = target.plan(), read_report(down)
    assert plan.scheme.name == "4bit"
    assert report.eval.after
    assert target.rows
    loss = plain_loss(load_target(target, plan), read_rows(target.rows).rows)
    assert loss == pytest.approx(report.eval.after.loss, rel=2e-2)


def test_stages_that_change_nothing_are_one_training(recipe: RecipeFile) -> None:
    """Rows, learning rates, optimizer and dropout go on where the stage before was."""
    settings = {"lr_scheduler_type": "cosine", "warmup_steps": 0.5}
    one = run(recipe("one", model=FLOAT, train=settings | {"max_steps": 6, "stages": ...}))
    parts = [{"max_steps": 2}, {"max_steps": 1}, {"num_train_epochs": 1.0}]
    several = run(recipe("several", model=FLOAT, train=settings | {"stages": parts}))
    assert several.loss == one.loss
    assert (several.eval.before, several.eval.after) == (one.eval.before, one.eval.after)
    for name, tensor in weights(Path(one.run)).items():
        torch.testing.assert_close(tensor, weights(Path(several.run))[name], rtol=0, atol=0)


def test_what_is_reset_begins_anew(recipe: RecipeFile, tmp_path: Path) -> None:
    stages = [
        {"max_steps": 2},
        {"max_steps": 2, "reset_lr_scheduler": True, "lr_scheduler_type": "constant", "learning_rate": 3e-3},
        {"max_steps": 1, "reset_optimizer": True, "lr_scheduler_type": "constant", "weight_decay": 0.1},
        {"max_steps": 2, "reset_lr_scheduler": True},
    ]
    train = {"stages": stages, "warmup_steps": 0.0, "save_steps": 1, "save_total_limit": None}
    report = run(recipe(model=FLOAT, train=train))
    rates = [rate for _, _, rate, _ in report.loss.history]
    assert rates == pytest.approx([1e-2, 5e-3, 3e-3, 3e-3, 1e-2, 1e-2, 5e-3])

    def optimizer(step: int) -> tuple[set[float], float]:
        path = tmp_path / "part" / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt"
        state = torch.load(path, weights_only=True)
        return {float(each["step"]) for each in state["state"].values()}, state["param_groups"][0]["weight_decay"]

    assert [optimizer(step)[0] for step in (2, 3, 4, 5, 6, 7)] == [{2.0}, {3.0}, {4.0}, {1.0}, {2.0}, {3.0}]
    assert [optimizer(step)[1] for step in (4, 5, 6)] == [0.0, 0.1, 0.0]


def test_no_two_models_are_there_at_once(recipe: RecipeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor with an optimizer in 8 bits, for which the library keeps a list of embeddings."""
    held: list[weakref.ref[Any]] = []

    def watched(plan: Any) -> Any:
        assert [ref for ref in held if ref() is not None] == []
        model = load_base(plan)
        held.extend(weakref.ref(module) for module in model.modules())
        return model

    monkeypatch.setattr(qft.training.session, "load_base", watched)
    stages = [{"quant.mode": mode, "max_steps": 1} for mode in ("none", "8bit", "4bit")]
    run(recipe(train={"optim": "adamw_8bit", "stages": stages}))
    assert len(held) > 90


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        (0, {"max_steps": 4}, r"train\.stages\.0\.max_steps: the run was started with 3, and this is 4"),
        (1, {"quant.mode": "4bit"}, r"train\.stages\.1\.quant\.mode: the run was started with 8bit"),
        (2, {"reset_optimizer": True}, r"train\.stages\.2\.reset_optimizer: the run was started with false"),
        (None, {}, r"train\.stages: the run was started with 3, and this is 2"),
    ],
    ids=["border", "mode", "reset", "fewer"],
)
def test_what_stages_are_is_not_changed_by_resuming(
    stage: int | None, change: dict[str, Any], message: str, recipe: RecipeFile, down: Path, tmp_path: Path
) -> None:
    shutil.copytree(down, tmp_path / "part")
    stages = [each | (change if i == stage else {}) for i, each in enumerate(DOWN)]
    with pytest.raises(RunError, match=message):
        run(recipe(train={"stages": stages if change else DOWN[:2]}), resume=True)


def test_the_last_stage_may_go_on_for_longer(recipe: RecipeFile) -> None:
    short = [{"max_steps": 2}, {"max_steps": 1}]
    longer = [{"max_steps": 2}, {"max_steps": 3, "learning_rate": 5e-3}]
    run(recipe(model=FLOAT, train={"stages": short}))
    view = Cut("nothing")
    report = train(load(recipe(model=FLOAT, train={"stages": longer})), view, resume=True)
    assert (report.steps, report.resumed_from) == (5, [3])
    assert {text for text in view.told if text.startswith("From here on")} == {
        "From here on, train.stages.1.max_steps is 3, and was 1",
        "From here on, train.stages.1.learning_rate is 0.005, and was 0.01",
    }
