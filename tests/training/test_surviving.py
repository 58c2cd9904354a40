"""Memory that runs out: the step is made again with less at once, and what is learnt is the same."""

from __future__ import annotations

import io
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.modules.module import register_module_forward_hook

from qft.commands.train import train
from qft.documents.training import Report, read_report
from qft.errors import OutOfMemoryError
from qft.progress import View
from qft.recipe import load
from qft.views.terminal.training import render
from tests.support.architectures import write_model
from tests.support.memory import Change, above, assert_equal, changes, exhausted, optimizer_fails, times
from tests.support.once import once
from tests.support.rows import chat, write_jsonl
from tests.support.runs import MODES, Leaves, adapter, run

RecipeFile = Callable[..., Path]
Failing = Callable[[], AbstractContextManager[None]]

ROWS, CHECKPOINTING = "train.per_device_train_batch_size", "train.gradient_checkpointing"
EVAL_ROWS = "train.per_device_eval_batch_size"
TRAIN = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "report_to": [],
}


class Told(View):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.notes = list[str]()

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def recipe(recipe_file: RecipeFile, tmp_path: Path) -> RecipeFile:
    """Writes a recipe of 22 rows of many lengths, in float32, into the run folder that it is told."""
    lengths = (1, 9, 2, 12, 5, 20, 3, 7, 15, 4, 11, 6, 18, 8, 13, 10, 2, 16, 14, 1, 17, 19)
    rows = [chat(f"count {n}", " ".join(map(str, range(n)))) for n in lengths]
    data = {"train": str(write_jsonl(tmp_path / "uneven.jsonl", rows))}
    write_jsonl(tmp_path / "held.jsonl", rows[:7])

    def write(folder: str = "run", **sections: Any) -> Path:
        held = {"eval": str(tmp_path / "held.jsonl")} if sections.pop("held_out", False) else {}
        train_section = TRAIN | sections.pop("train", {})
        wanted: dict[str, Any] = {"model": {"dtype": "float32"}, "quant": None, "data": data | held}
        wanted |= {"train": train_section, "output_dir": str(tmp_path / folder)} | sections
        return recipe_file(f"{folder}.yaml", **wanted)

    return write


@pytest.fixture
def whole(recipe: RecipeFile, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What comes of the recipe as it is where memory does not run out."""
    folder = once(tmp_path_factory, "survived", lambda folder: run(recipe("whole", output_dir=str(folder / "run"))))
    return read_report(folder / "run")


BLOCKS = 2
"""Each pass of training is counted in both blocks."""
CASES: dict[str, tuple[Failing, list[Change]]] = {
    "backward": (lambda: exhausted(above(2), phase="backward"), [(1, "backward", ROWS, 2, 4)]),
    "several in a row": (lambda: exhausted(above(1)), [(1, "forward", ROWS, 2, 4), (1, "forward", ROWS, 1, 8)]),
    # The second block of the second micro-batch of the second step: one was passed, and its gradients are dropped.
    "later, within accumulation": (lambda: exhausted(times(8)), [(2, "forward", ROWS, 2, 4)]),
    "backward, within accumulation": (
        lambda: exhausted(times(BLOCKS * 3 + 1), phase="backward"),
        [(2, "backward", ROWS, 2, 4)],
    ),
    "until checkpointed": (
        lambda: exhausted(times(1, 2, 3)),
        [(1, "forward", ROWS, 2, 4), (1, "forward", ROWS, 1, 8), (1, "forward", CHECKPOINTING, True, 8)],
    ),
    "optimizer, first step": (lambda: optimizer_fails(1), [(1, "optimizer", ROWS, 2, 4)]),
    "optimizer, its state is made": (lambda: optimizer_fails(1, after=True), [(1, "optimizer", ROWS, 2, 4)]),
    "optimizer, later": (lambda: optimizer_fails(3, 4), [(3, "optimizer", ROWS, 2, 4), (3, "optimizer", ROWS, 1, 8)]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_learnt_is_what_would_have_been(case: str, whole: Report, recipe: RecipeFile) -> None:
    failing, expected = CASES[case]
    assert whole.out_of_memory == []
    view = Told()
    with failing():
        report = train(load(recipe()), view)
    assert_equal(report, whole)
    assert changes(report) == expected
    assert [event.asked_bytes for event in report.out_of_memory] == [1 << 60] * len(expected)
    assert [note for note in view.notes if "out of memory" in note] == [e.told() for e in report.out_of_memory]
    assert any("Memory ran out" in line for line in report.advice)


VARIANTS: dict[str, dict[str, Any]] = {
    "odd, adafactor": {
        "train": {"per_device_train_batch_size": 7, "gradient_accumulation_steps": 1, "optim": "adafactor"}
    },
    "by length, smoothed, 8-bit optimizer": {
        "train": {"train_sampling_strategy": "group_by_length", "label_smoothing_factor": 0.1, "optim": "adamw_8bit"}
    },
    "workers, in order": {"train": {"dataloader_num_workers": 1, "train_sampling_strategy": "sequential"}},
    "epochs, never clipped": {
        "train": {"max_steps": ..., "num_train_epochs": 1.0, "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.1}
    },
    "stages, checkpointed": {
        "train": {"max_steps": ..., "stages": [{"max_steps": 1}, {"max_steps": 2}], "gradient_checkpointing": True}
    },
    "all weights, skipping": {
        "adapter": {"kind": "none", "r": ...},
        "train": {"learning_rate": 1e-4, "on_nonfinite": "skip", "logging_steps": 2},
    },
    "skipped": {"train": {"on_nonfinite": "skip", "learning_rate": 1e30, "max_grad_norm": 0.0}},
}


@contextmanager
def both_fail() -> Iterator[None]:
    """The passes of the first step, its update, and one of a later step, which comes to half-sized batches."""
    with exhausted(above(4)), optimizer_fails(1, after=True):
        yield


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_holds_whatever_the_recipe_asks(variant: str, recipe: RecipeFile) -> None:
    sections = VARIANTS[variant]
    sections = sections | {"train": {"max_steps": 3} | sections["train"]}
    whole = run(recipe("whole", **sections))
    with both_fail():
        report = run(recipe(**sections))
    assert len(report.out_of_memory) == (2 if "odd" in variant else 1)
    assert_equal(report, whole)


FAMILIES: dict[str, tuple[str, dict[str, float]]] = {
    "gpt2": ("GPT2Block", dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)),
    "gpt_neox": ("GPTNeoXLayer", {}),
    "mixtral": ("MixtralDecoderLayer", {}),
    "opt": ("OPTDecoderLayer", {"dropout": 0.0}),
    "bloom": ("BloomBlock", {}),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_holds_for_every_family(kind: str, recipe: RecipeFile, tmp_path: Path) -> None:
    block, changed = FAMILIES[kind]
    model = {"path": str(write_model(tmp_path / kind, kind, **changed)), "dtype": "float32"}
    sections = {"model": model, "train": {"max_steps": 2}}
    whole = run(recipe("whole", **sections))
    with exhausted(above(2), module=block):
        report = run(recipe(**sections))
    assert changes(report) == [(1, "forward", ROWS, 2, 4)]
    assert_equal(report, whole)


@pytest.mark.parametrize("shared", ["packing", "padding_free"])
def test_examples_that_share_a_row_are_told_apart_again(shared: str, recipe: RecipeFile) -> None:
    sections = {"data": {shared: True}, "train": {"max_steps": 2}}
    whole = run(recipe("whole", **sections))
    with exhausted(times(1, BLOCKS * 2 + 1)):
        report = run(recipe(**sections))
    assert changes(report) == [(1, "forward", ROWS, 2, 4), (1, "forward", ROWS, 1, 8)]
    assert_equal(report, whole)


def test_experts_that_are_balanced_over_a_batch_are_not_divided(recipe: RecipeFile, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "experts", "mixtral", output_router_logits=True)
    path = recipe(model={"path": str(folder), "dtype": "float32"}, train={"max_steps": 1})
    with exhausted(times(1), module="MixtralDecoderLayer"):
        report = run(path)
    assert changes(report) == [(1, "forward", CHECKPOINTING, True, 2)]


def test_the_curves_that_are_sent_elsewhere_are_the_same(recipe: RecipeFile) -> None:
    """The Trainer's own sum of losses, which was told of some of a step's before the step began again."""
    logged = []
    for folder, failing in (("whole", nullcontext()), ("run", exhausted(times(8)))):
        with failing:
            report = run(recipe(folder, train={"save_strategy": "steps", "save_steps": 4}))
        state = Path(report.run, "checkpoints", "checkpoint-4", "trainer_state.json")
        logged.append([entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry])
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)


def test_nothing_of_the_failed_step_is_kept(recipe: RecipeFile) -> None:
    """Of what its blocks gave, no tensor is left when the step begins again, nor a gradient."""
    given: list[weakref.ref[torch.Tensor]] = []
    left: list[int] = []

    def hook(module: Any, inputs: Any, output: Any) -> None:
        if type(module).__name__ == "LlamaMLP" and module.training:
            if len(inputs[0]) == 2 and not left:
                left.append(sum(each() is not None for each in given))
            given.append(weakref.ref(output))

    for phase, checkpointing in (("forward", False), ("backward", False), ("backward", True)):
        given.clear()
        left.clear()
        handle = register_module_forward_hook(hook)
        settings = {"max_steps": 1, "gradient_checkpointing": checkpointing}
        try:
            with exhausted(above(2), phase=phase):
                run(recipe(f"{phase}-{checkpointing}", train=settings))
        finally:
            handle.remove()
        assert left == [0]


def test_fail_stops_at_the_first_time_and_says_what_helps(recipe: RecipeFile) -> None:
    path = recipe(memory={"on_oom": "fail"})
    with (
        exhausted(above(2)),
        pytest.raises(OutOfMemoryError, match=r"while training: .*can't allocate memory") as error,
    ):
        run(path)
    assert error.value.exit_code == 9
    assert "lower train.per_device_train_batch_size (4)" in str(error.value)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"train": {"per_device_eval_batch_size": 5}}, "train.per_device_eval_batch_size (5)"),
        (
            {
                "eval": {"metrics": ["exact_match"], "max_new_tokens": 4, "batch_size": 3},
                "train": {"per_device_eval_batch_size": 1},
            },
            "eval.batch_size (3)",
        ),
    ],
)
def test_an_evaluation_that_has_no_memory_is_told_what_helps_it(
    asked: dict[str, Any], field: str, recipe: RecipeFile
) -> None:
    def when(rows: int, trains: bool) -> bool:
        return not trains and rows == int(field[-2])

    with exhausted(when), pytest.raises(OutOfMemoryError, match="while evaluating held-out rows") as error:
        run(recipe(held_out=True, memory={"on_oom": "fail"}, **asked))
    assert f"What helps, the most first: lower {field}" in str(error.value)
    assert "per_device_train_batch_size" not in str(error.value)


def test_with_nothing_left_the_message_names_what_is_left(recipe: RecipeFile) -> None:
    view = Told()
    with exhausted(above(0)), pytest.raises(OutOfMemoryError) as error:
        train(load(recipe()), view)
    assert sum("out of memory in the forward pass" in note for note in view.notes) == 3
    assert "per_device_train_batch_size" not in str(error.value)
    assert "gradient_checkpointing" not in str(error.value)
    assert "lower data.max_length" in str(error.value)


def test_an_update_that_was_cut_off_later_is_not_made_twice(recipe: RecipeFile) -> None:
    view = Told()
    with optimizer_fails(3, after=True), pytest.raises(OutOfMemoryError):
        train(load(recipe()), view)
    assert "step 3: memory ran out midway in the update, which cannot be made again" in view.notes


def test_other_failures_are_not_survived(recipe: RecipeFile) -> None:
    def hook(module: Any, *_: Any) -> None:
        if type(module).__name__ == "LlamaMLP":
            raise RuntimeError("shapes cannot be multiplied")

    handle = register_module_forward_hook(hook)
    try:
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            run(recipe())
    finally:
        handle.remove()


RESUMED: dict[str, tuple[Failing, Failing]] = {
    "changed before the checkpoint": (lambda: exhausted(times(8)), nullcontext),
    "checkpointed before it": (lambda: exhausted(times(1, 2, 3)), nullcontext),
    "changed after it": (lambda: exhausted(times(12)), lambda: exhausted(times(12 - BLOCKS * 2 * 2))),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_goes_on_as_it_was_changed(case: str, recipe: RecipeFile, tmp_path: Path) -> None:
    """To the bit, with dropout and noise: what was changed stands in the checkpoint."""
    noisy = {"train": {"save_strategy": "steps", "save_steps": 2, "neftune_noise_alpha": 5.0}}
    noisy |= {"adapter": {"lora_dropout": 0.2}}
    failing, again = RESUMED[case]
    with failing():
        whole = train(load(recipe("whole", **noisy)), Leaves(tmp_path / "whole", {3: "run"}))
    view = Told()
    with again():
        resumed = train(load(recipe(**noisy)), view, resume=True)
    assert resumed.resumed_from == [2]
    assert resumed.out_of_memory == whole.out_of_memory != []
    assert resumed.loss == whole.loss
    for name, tensor in adapter(Path(whole.run)).items():
        torch.testing.assert_close(adapter(Path(resumed.run))[name], tensor, rtol=0, atol=0)
    told = f"Going on with {ROWS} {resumed.out_of_memory[-1].now}"
    assert any(told in note for note in view.notes) is (case == "changed before the checkpoint")


def test_an_evaluation_goes_on_with_fewer_rows(recipe: RecipeFile) -> None:
    """Before, within and after the training; its loss is that of the rows at once, and it draws nothing."""
    evaluated = {"train": {"eval_strategy": "steps", "eval_steps": 2}, "held_out": True}
    whole = run(recipe("whole", **evaluated))
    with exhausted(lambda rows, trains: not trains and rows > 1):
        report = run(recipe(**evaluated))
    assert changes(report) == [(0, "evaluation", EVAL_ROWS, 2, 2), (0, "evaluation", EVAL_ROWS, 1, 2)]
    assert_equal(report, whole)
    for one, other in zip(
        [report.eval.before, *report.eval.history, report.eval.after],
        [whole.eval.before, *whole.eval.history, whole.eval.after],
        strict=True,
    ):
        assert one is not None
        assert other is not None
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert (one.tokens, one.rows) == (other.tokens, other.rows)


def test_answers_are_written_fewer_at_once(recipe: RecipeFile) -> None:
    asked = {"eval": {"metrics": ["exact_match"], "max_new_tokens": 4, "batch_size": 3}, "held_out": True}
    asked |= {"train": {"per_device_eval_batch_size": 1, "max_steps": 1}}
    whole = run(recipe("whole", **asked))
    with exhausted(lambda rows, trains: not trains and rows > 2):
        report = run(recipe(**asked))
    assert changes(report) == [(0, "evaluation", "eval.batch_size", 2, 2)]
    assert report.eval == whole.eval
    for moment in ("before", "after"):
        one, other = (Path(each.run) / "answers" / f"{moment}.jsonl" for each in (report, whole))
        assert one.read_text() == other.read_text()


def test_the_smaller_batch_is_shown(recipe: RecipeFile) -> None:
    with exhausted(above(2)):
        report = run(recipe(train={"max_steps": 1}))
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(render(report))
    told = "step 1: out of memory in the forward pass, which asked for 1073741824.0 GiB: "
    assert f"{told}{ROWS} 4 → 2, gradient_accumulation_steps 4" in " ".join(console.export_text().split())
    assert "Memory ran out, and what was changed" in Path(report.run, "report.html").read_text()


@pytest.mark.parametrize("mode", ["nf4", "8bit"])
def test_it_holds_in_few_bits_within_their_rounding(mode: str, recipe: RecipeFile) -> None:
    sections = MODES[mode] | {"train": {"max_steps": 2}}
    whole = run(recipe("whole", **sections))
    with exhausted(above(1), phase="backward"):
        report = run(recipe(**sections))
    assert [event.now for event in report.out_of_memory] == [2, 1]
    for mine, others in zip(report.loss.history, whole.loss.history, strict=True):
        assert mine[1] == pytest.approx(others[1], rel=0.02)
