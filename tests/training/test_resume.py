"""A training that was cut off and resumed is the one that was not: its order, its numbers, its report."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from qft.commands.train import train
from qft.documents.state import TrainingState
from qft.documents.training import Report, read_report
from qft.errors import RunError
from qft.progress import Step, View
from qft.recipe import load
from qft.run.checkpoint import HASHES, STATE
from qft.views.terminal.training import render
from tests.support.once import once
from tests.support.rows import chat, write_jsonl
from tests.support.runs import HARD, Leaves, adapter, run

RecipeFile = Callable[..., Path]

EPOCH = 4
"""Steps: of seven rows, two in each step but the last."""
TRAIN = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_steps": 2 * EPOCH,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "report_to": [],
    "save_strategy": "steps",
}
MIDST, BOUNDARY = {"save_steps": 3}, {"save_steps": EPOCH}
"""Of the second epoch, or of both: where the checkpoint lies that a run goes on from."""
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
FULL = {"quant": None, "model": {"dtype": "float32"}}
BEST = {"load_best_model_at_end": True, "early_stopping_patience": 3}
EACH = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


class Cut(View):
    """Ends the process, as it were, at a step, before that step's checkpoint."""

    def __init__(self, step: int = 7) -> None:
        self.at, self.told = step, list[str]()

    def note(self, text: str) -> None:
        self.told.append(text)

    def step(self, step: Step) -> None:
        if step.step == self.at:
            raise KeyboardInterrupt


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of seven rows of many lengths, at one path for all tests."""
    rows = [chat(f"count {n}", " ".join(map(str, range(n)))) for n in (1, 9, 2, 12, 5, 20, 3)]
    return once(tmp_path_factory, "uneven", lambda folder: write_jsonl(folder / "uneven.jsonl", rows)) / "uneven.jsonl"


@pytest.fixture
def recipe(recipe_file: RecipeFile, uneven: Path, tmp_path: Path) -> RecipeFile:
    """Writes a recipe of rows of many lengths, with dropout, into the run folder that it is told."""
    data = {"train": str(uneven)}
    (tmp_path / "held.jsonl").write_text("".join(uneven.read_text().splitlines(keepends=True)[:2]))

    def write(folder: str = "part", **sections: Any) -> Path:
        wanted: dict[str, Any] = {"adapter": {"lora_dropout": 0.2}, "data": data, "train": TRAIN}
        wanted["output_dir"] = str(tmp_path / folder)
        for name, section in sections.items():
            wanted[name] = wanted.get(name, {}) | section if isinstance(section, dict) else section
        if "eval_strategy" in wanted["train"]:
            wanted["data"] = {"eval": str(tmp_path / "held.jsonl")} | wanted["data"]
        return recipe_file(f"{folder}.yaml", **wanted)

    return write


@pytest.fixture
def whole(recipe: RecipeFile, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What comes of the recipe where nothing cuts it off; beside it what a kill in step 5 or 7 would have left."""

    def make(folder: Path) -> None:
        path = recipe("whole", train=MIDST, output_dir=str(folder / "run"))
        train(load(path), Leaves(folder / "run", {5: "killed5", 7: "killed7"}))

    return read_report(once(tmp_path_factory, "unbroken", make) / "run")


@pytest.fixture
def killed(whole: Report, recipe: RecipeFile, tmp_path: Path) -> Callable[[int], Path]:
    """The recipe of a run that was killed in step 5, behind checkpoint 3, or in step 7, behind checkpoint 6."""

    def copied(step: int) -> Path:
        shutil.copytree(Path(whole.run).with_name(f"killed{step}"), tmp_path / "part")
        return recipe(train=MIDST)

    return copied


def cut(path: Path, step: int = 7) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(load(path), Cut(step))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    whole = folder / "model" / "model.safetensors"
    return load_file(whole) if whole.exists() else adapter(folder)


def assert_same(whole: Report, resumed: Report) -> None:
    """All that is learnt and measured, but for time and memory."""
    assert (whole.resumed_from, len(resumed.resumed_from)) == ([], 1)
    assert resumed.loss == whole.loss
    assert resumed.eval == whole.eval
    for name in ("steps", "skipped_steps", "samples", "tokens", "supervised_tokens", "lengths", "unmeasured_steps"):
        assert getattr(resumed, name) == getattr(whole, name), name
    assert resumed.throughput.padding_share == whole.throughput.padding_share
    assert [step for step, _ in resumed.throughput.history] == [step for step, _ in whole.throughput.history]
    assert [step for step, *_ in resumed.memory.history] == [step for step, *_ in whole.memory.history]
    one, other = weights(Path(whole.run)), weights(Path(resumed.run))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0)


CASES: dict[str, dict[str, Any]] = {
    "random, boundary, late evaluation": {"train": BOUNDARY | {"eval_strategy": "epoch"}},
    "by length, workers": {
        "train": MIDST | {"train_sampling_strategy": "group_by_length", "dataloader_num_workers": 2}
    },
    "by length, boundary": {"train": BOUNDARY | {"train_sampling_strategy": "group_by_length"} | EVALUATED},
    "epochs": {"train": {"max_steps": ..., "num_train_epochs": 2.0, "save_strategy": "epoch"} | EVALUATED},
    "sequential, all weights": FULL
    | {
        "adapter": {"kind": "none", "r": ..., "lora_dropout": ...},
        "train": MIDST | {"train_sampling_strategy": "sequential"},
    },
    "moved base": FULL | {"adapter": {"init_lora_weights": "pissa_niter_4"}, "train": MIDST},
    "skipped": {"train": MIDST | {"learning_rate": 1e30, "max_grad_norm": 0.0, "on_nonfinite": "skip"}},
    "8-bit states, checkpointed, noise": {
        "adapter": {"r": 64},
        "train": MIDST
        | {"optim": "adamw_8bit", "weight_decay": 0.1, "gradient_checkpointing": True, "neftune_noise_alpha": 5.0},
    },
    "weighted": {
        "data": {"train": [{"path": "uneven.jsonl", "weight": 2.0}, {"path": "chats.jsonl", "weight": 0.5}]},
        "train": MIDST,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_killed_comes_to_the_same(case: str, recipe: RecipeFile, uneven: Path, tmp_path: Path) -> None:
    shutil.copy(uneven, tmp_path)
    whole = train(load(recipe("whole", **CASES[case])), Leaves(tmp_path / "whole", {7: "part"}))
    assert_same(whole, run(recipe("part", **CASES[case]), resume=True))


def test_a_run_that_was_cut_off_in_an_epoch_comes_to_the_same(whole: Report, recipe: RecipeFile) -> None:
    path = recipe(train=MIDST)
    cut(path)
    assert_same(whole, run(path, resume=True))


def rates(report: Report) -> list[float]:
    return [rate for _, _, rate, _ in report.loss.history]


def groups(folder: Path, step: int) -> list[dict[str, Any]]:
    """Hyperparameters of the optimizer in a checkpoint."""
    state = torch.load(folder / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
    return [{name: value for name, value in group.items() if name != "params"} for group in state["param_groups"]]


@pytest.mark.parametrize("schedule", ["cosine", "polynomial"])
def test_hyperparameters_are_those_that_are_asked_now(schedule: str, recipe: RecipeFile, tmp_path: Path) -> None:
    settings = MIDST | {"lr_scheduler_type": schedule, "warmup_steps": 2.0}
    new = {"learning_rate": 3e-3, "weight_decay": 0.3, "adam_beta1": 0.7, "adam_beta2": 0.9, "adam_epsilon": 1e-3}
    new |= {"max_steps": 9, "max_grad_norm": 0.01}
    asked = run(recipe("whole", train=settings | new))
    old = recipe(train=settings)
    before = load(old).recipe
    cut(old, 5)
    view = Cut(99)
    resumed = train(load(recipe(train=settings | new)), view, resume=True)
    assert resumed.resumed_from == [3]
    assert rates(resumed)[3:] == rates(asked)[3:]
    assert rates(resumed)[:3] != rates(asked)[:3]
    assert groups(tmp_path / "part", 9) == groups(tmp_path / "whole", 9)
    for name, value in new.items():
        assert f"From here on, train.{name} is {value}, and was {getattr(before.train, name)}" in view.told


def test_more_epochs_are_a_longer_schedule(recipe: RecipeFile) -> None:
    once = {"max_steps": ..., "num_train_epochs": 1.0, "save_strategy": "epoch"}
    first = run(recipe(train=once))
    longer = once | {"num_train_epochs": 2.0}
    resumed = run(recipe(train=longer), resume=True)
    assert (first.steps, resumed.steps, resumed.resumed_from) == (EPOCH, 2 * EPOCH, [EPOCH])
    assert rates(resumed)[EPOCH:] == rates(run(recipe("whole", train=longer)))[EPOCH:]


FIXED: dict[str, Any] = {
    "model.dtype": "float32",
    "quant.quant_type": "fp4",
    "quant.skip_modules": ["o_proj"],
    "adapter.target_modules": ["q_proj"],
    "data.train": "held.jsonl",
    "data.max_length": 100,
    "train.optim": "adamw_8bit",
    "train.per_device_train_batch_size": 2,
    "train.bf16": False,
    "seed": 1,
}


def test_what_the_checkpoint_was_made_by_is_refused_by_name(
    killed: Callable[[int], Path], recipe: RecipeFile, tmp_path: Path
) -> None:
    killed(5)
    for field, value in FIXED.items():
        section, _, name = field.rpartition(".")
        changed = {section: {name: value} | (MIDST if section == "train" else {})} if section else {name: value}
        with pytest.raises(RunError) as caught:
            run(recipe(**{"train": MIDST} | changed), resume=True)
        assert len(str(caught.value).splitlines()) == 1
        place = rf"{tmp_path / 'part.yaml'}:\d+: {field}: the run was started with \S+, and this is"
        assert re.match(place, str(caught.value)), caught.value
        assert "or start anew with --overwrite" in str(caught.value)
    assert run(recipe(train=MIDST | {"bf16": True}), resume=True).steps == 2 * EPOCH  # which is what auto came to


def test_what_a_field_names_must_be_what_it_was(
    recipe: RecipeFile, uneven: Path, tmp_path: Path, tiny_model: Path
) -> None:
    model, template, rows = tmp_path / "model", tmp_path / "template.jinja", tmp_path / "uneven.jsonl"
    shutil.copy(uneven, rows)
    shutil.copytree(tiny_model, model)
    shutil.copy(model / "chat_template.jinja", template)
    data = {"train": str(rows), "chat_template": str(template)}
    path = recipe(model={"path": str(model)}, data=data, train=MIDST)
    cut(path, 5)
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    with pytest.raises(RunError, match=r"part.yaml:\d+: model.path: config.json changed since the run began"):
        run(path, resume=True)
    template.write_text(template.read_text().replace("<|im_start|>", "<|bos|><|im_start|>"))
    with pytest.raises(RunError, match=r"part.yaml:\d+: data.train: .*uneven.jsonl gave 7 rows of \d+ tokens"):
        run(path, resume=True)
    shutil.copy(tmp_path / "held.jsonl", rows)
    with pytest.raises(RunError, match=r"part.yaml:\d+: data.train: .*uneven.jsonl has changed"):
        run(path, resume=True)


def test_how_often_to_save_and_evaluate_may_change(recipe: RecipeFile, tmp_path: Path) -> None:
    cut(recipe(train=MIDST | EVALUATED), 5)
    often = EVALUATED | {"eval_steps": 1, "save_steps": 2, "save_total_limit": None}
    resumed = run(recipe(train=often, eval={"metrics": ["exact_match"], "max_new_tokens": 2}), resume=True)
    assert [evaluation.step for evaluation in resumed.eval.history] == [2, 4, 5, 6, 7, 8]
    kept = {path.name for path in (tmp_path / "part" / "checkpoints").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{step}" for step in (3, 4, 6, 8)}
    render(resumed)  # whose evaluation before has no score


@pytest.fixture
def hopeless(recipe: RecipeFile, tmp_path_factory: pytest.TempPathFactory) -> RecipeFile:
    """The recipe of a run that soon learns what makes the held-out answer less likely."""

    def make(folder: Path) -> None:
        write_jsonl(folder / "train.jsonl", [chat("say", "a" * 30)] * 4)
        write_jsonl(folder / "eval.jsonl", [chat("say", "b" * 30)])

    data = {name: str(once(tmp_path_factory, "hopeless", make) / f"{name}.jsonl") for name in ("train", "eval")}

    def write(folder: str = "part", output_dir: str | None = None, **more: Any) -> Path:
        train = HARD | EACH | BEST | {"learning_rate": 0.1, "max_steps": 20, "per_device_train_batch_size": 2} | more
        return recipe(folder, data=data, train=train, **{"output_dir": output_dir} if output_dir else {})

    return write


@pytest.fixture
def stopped(hopeless: RecipeFile, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What comes of it where nothing cuts it off; beside it what a kill behind its last step would have left."""

    def make(folder: Path) -> None:
        train(load(hopeless("whole", str(folder / "run"))), Leaves(folder / "run", {"after training": "killed"}))

    return read_report(once(tmp_path_factory, "stopped", make) / "run")


def test_early_stopping_has_waited_what_it_has_waited(stopped: Report, hopeless: RecipeFile, tmp_path: Path) -> None:
    whole = stopped
    losses = [evaluation.loss for evaluation in whole.eval.history]
    best = losses.index(min(losses)) + 1
    assert whole.steps == best + 3
    path = hopeless()
    cut(path, best + 2)
    assert_same(whole, run(path, resume=True))
    with pytest.raises(RunError, match=f"made its {best + 3} steps; there is nothing to resume: ask for more steps"):
        run(path, resume=True)
    moved = hopeless("moved", early_stopping_patience=4)
    shutil.move(tmp_path / "part", tmp_path / "moved")
    patient = run(moved, resume=True)
    assert patient.steps == best + 4
    assert patient.eval.after
    assert whole.eval.after
    assert patient.eval.after.loss == whole.eval.after.loss  # of the best checkpoint, where it lies now
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / f"checkpoint-{best}")
    with pytest.raises(RunError, match=rf"load_best_model_at_end: .*checkpoint-{best}, the best .* is missing"):
        run(hopeless("moved", early_stopping_patience=6), resume=True)


def test_early_stopping_may_be_asked_for_later(stopped: Report, hopeless: RecipeFile) -> None:
    cut(hopeless(load_best_model_at_end=False, early_stopping_patience=...), 2)
    resumed = run(hopeless(), resume=True)
    assert (resumed.steps, resumed.eval.after) == (stopped.steps, stopped.eval.after)


@pytest.mark.parametrize("stops_early", [True, False])
def test_a_run_that_fell_after_its_last_step_is_finished(
    stops_early: bool, stopped: Report, hopeless: RecipeFile, tmp_path: Path
) -> None:
    changes = {} if stops_early else {"max_steps": 3, "early_stopping_patience": ...}
    if stops_early:
        whole = stopped
        shutil.copytree(Path(whole.run).with_name("killed"), tmp_path / "part")
    else:
        leaves = Leaves(tmp_path / "whole", {"after training": "part"})
        whole = train(load(hopeless("whole", **changes)), leaves)
    shutil.rmtree(tmp_path / "part" / "adapter")
    assert_same(whole, run(hopeless(**changes), resume=True))


def test_fewer_steps_than_were_made_are_refused(killed: Callable[[int], Path], recipe: RecipeFile) -> None:
    killed(7)
    with pytest.raises(RunError, match=r"yaml:\d+: train.max_steps: this asks for 5 steps in all, and .* made 6"):
        run(recipe(train=MIDST | {"max_steps": 5}), resume=True)
    assert run(recipe(train=MIDST | {"max_steps": 6}), resume=True).steps == 6


def test_a_run_that_is_cut_off_twice_says_so(whole: Report, recipe: RecipeFile, tmp_path: Path) -> None:
    path = recipe(train={"save_steps": 2})
    cut(path, 3)
    view = Cut(6)
    with pytest.raises(KeyboardInterrupt):
        train(load(path), view, resume=True)
    checkpoints = tmp_path / "part" / "checkpoints"
    assert f"Going on from {checkpoints / 'checkpoint-2'}" in view.told
    before = TrainingState.model_validate_json((checkpoints / "checkpoint-4" / STATE).read_bytes())
    grown = before.model_copy(update={"wall_seconds": 1e6, "peak_host_bytes": 10**15})
    (checkpoints / "checkpoint-4" / STATE).write_text(grown.model_dump_json())
    (checkpoints / "checkpoint-4" / HASHES).unlink()
    resumed = run(path, resume=True)
    assert resumed.resumed_from == [2, 4]
    assert json.loads((tmp_path / "part" / "manifest.json").read_text())["resumed_from"] == [2, 4]
    assert resumed.loss == whole.loss
    assert 1e6 < resumed.wall_seconds < 2e6
    assert resumed.memory.peak_host_bytes == 10**15
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(render(resumed))
    assert re.search("resumed from +step 2, 4\n", console.export_text())


def test_a_checkpoint_of_an_older_qft_is_resumed_and_what_is_missing_said(
    whole: Report, killed: Callable[[int], Path], tmp_path: Path
) -> None:
    path = killed(7)
    state = tmp_path / "part" / "checkpoints" / "checkpoint-6" / STATE
    state.with_name(HASHES).unlink()
    state.write_text("{")
    with pytest.raises(RunError, match=r"qft_state\.json: cannot be read; delete it"):
        run(path, resume=True)
    state.unlink()
    view = Cut(99)
    resumed = train(load(path), view, resume=True)
    assert any("checkpoint-6 has no qft_state.json: the report counts from step 7 on" in text for text in view.told)
    assert (resumed.unmeasured_steps, resumed.steps) == (6, 2)
    assert resumed.loss.history == whole.loss.history[6:]
    for name, tensor in adapter(Path(whole.run)).items():
        torch.testing.assert_close(tensor, adapter(tmp_path / "part")[name], rtol=0, atol=0)
