"""Two processes on a CPU learn what one does, in one run folder, and end together."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qft.run.checkpoint import checkpoints_in, newest_whole, step_of
from qft.training.trainer import QftTrainer
from tests.support.models import byte_tokenizer, tiny_llama
from tests.support.once import once
from tests.support.rows import chat, write_jsonl
from tests.support.runs import adapter, run
from tests.support.together import at_step, together

RecipeFile = Callable[..., Path]
STEPS, MICRO, PASSES, ROWS = 6, 2, 4, 26
"""Two epochs, and a part: rows divide neither by a micro-batch nor by an update."""


def recipe(folder: Path, model: Path, name: str, **sections: Any) -> Path:
    rows = [chat(f"say {i}", f"it is {i * 7}" * (1 + i % 3)) for i in range(ROWS)]
    made = {
        "model": {"path": str(model), "device": "cpu"},
        "quant": {"preset": "finetune", "quant_storage": "bfloat16"},
        "adapter": {"r": 4},
        "data": {"train": str(write_jsonl(folder / "rows.jsonl", rows)), "eval_fraction": 0.2, "max_length": 128},
        "train": {
            "per_device_train_batch_size": MICRO,
            "gradient_accumulation_steps": PASSES,
            "max_steps": STEPS,
            "learning_rate": 0.01,
            "warmup_steps": 0.0,
            "kernels": "plain",
            "save_strategy": "steps",
            "save_steps": 2,
            "save_total_limit": None,
            "report_to": [],
        },
        "output_dir": str(folder / name),
    }
    for section, fields in sections.items():
        made[section] = {**made.get(section, {}), **fields}  # type: ignore[dict-item]
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(made))
    return path


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one process: the model, and its run."""

    def make(folder: Path) -> None:
        tiny_llama(intermediate_size=64).save_pretrained(folder / "model")
        byte_tokenizer().save_pretrained(folder / "model")
        run(recipe(folder, folder / "model", "one"))

    return once(tmp_path_factory, "together", make)


def losses(folder: Path) -> list[float]:
    return [each[1] for each in report(folder)["loss"]["history"]]


def report(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_does(strategy: str, one: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, one / "model", "two", distributed={"strategy": strategy})
    first, second = together(path, "--json")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert json.loads(first.stdout) == report(tmp_path / "two")
    assert second.stdout == second.stderr == b""
    single, both = report(one / "one"), report(tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(one / "one"), abs=1e-4)
    for name in ("tokens", "supervised_tokens", "samples", "steps"):
        assert both[name] == single[name]
    for moment in ("before", "after"):
        assert both["eval"][moment]["loss"] == pytest.approx(single["eval"][moment]["loss"], abs=1e-4)
        assert both["eval"][moment]["tokens"] == single["eval"][moment]["tokens"]
    told = both["distributed"]
    assert (told["strategy"], len(told["ranks"]), single["distributed"]) == (strategy, 2, None)
    gate = told["bit_gate"]
    assert (gate and (gate["layers"], gate["layers_changed"])) == ((14, 0) if strategy == "fsdp2" else None)
    parts, whole = (each["memory"]["components"] for each in (both, single))
    share = 2 if strategy == "fsdp2" else 1
    assert [share * parts[name] for name in ("trainable_weights", "optimizer_state")] == pytest.approx(
        [whole[name] for name in ("trainable_weights", "optimizer_state")], rel=0.01
    )
    left = {path.name for path in (tmp_path / "two").iterdir()} ^ {path.name for path in (one / "one").iterdir()}
    assert not left
    trained, wanted = adapter(tmp_path / "two"), adapter(one / "one")
    assert trained.keys() == wanted.keys()
    # Adam's first updates are signs of gradients, some of which are next to nothing.
    assert all((trained[name] - wanted[name]).abs().mean() < 2e-3 for name in wanted)


def test_processes_share_packed_rows_in_the_order_of_one(one: Path, tmp_path: Path) -> None:
    order = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2, "max_steps": 4}
    packed: dict[str, Any] = {"data": {"packing": True, "eval_fraction": 0.0}, "train": order}
    single = run(recipe(tmp_path, one / "model", "single", **packed))
    both = together(recipe(tmp_path, one / "model", "two", distributed={"strategy": "ddp"}, **packed))
    assert [each.returncode for each in both] == [0, 0], both[0].stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "single"), abs=1e-4)
    told = report(tmp_path / "two")
    assert (told["tokens"], told["samples"]) == (single.tokens, single.samples)


def test_fewer_rows_than_processes_are_learnt_and_asked_once(one: Path, tmp_path: Path) -> None:
    row, other = (
        str(write_jsonl(tmp_path / f"{name}.jsonl", [chat(f"say {name}", f"it is {number}")]))
        for name, number in (("one", 7), ("another", 14))
    )
    settings: dict[str, Any] = {
        "data": {"train": row, "eval": other, "eval_fraction": 0.0},
        "eval": {"metrics": ["exact_match"], "max_new_tokens": 4},
        "train": {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "max_steps": 2,
            "chunked_loss": True,
        },
    }
    single = run(recipe(tmp_path, one / "model", "single", **settings))
    both = together(recipe(tmp_path, one / "model", "two", distributed={"strategy": "ddp"}, **settings))
    assert [each.returncode for each in both] == [0, 0], both
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "single"), abs=1e-4)
    told = report(tmp_path / "two")
    assert (told["tokens"], told["samples"]) == (single.tokens, single.samples)
    after, wanted = (each["eval"]["after"] for each in (told, report(tmp_path / "single")))
    assert after["loss"] == pytest.approx(wanted["loss"], abs=1e-4)
    assert (after["rows"], after["tokens"], after["scores"]) == (1, wanted["tokens"], wanted["scores"])


def test_a_loss_of_weighted_tokens_is_averaged_over_what_all_processes_weigh(one: Path, tmp_path: Path) -> None:
    rows = []
    for i in range(8):  # by turns of two: one process has the long answers that count little
        first, second = chat(f"say {i}", "it is so " * (1 + 3 * (i % 2)))["messages"], chat("more?", "no")["messages"]
        first[1]["weight"] = (1.0, 0.25)[i % 2]
        rows.append({"messages": [*first, *second]})
    weighted: dict[str, Any] = {
        "data": {
            "train": str(write_jsonl(tmp_path / "weighted.jsonl", rows)),
            "eval_fraction": 0.0,
            "prompt_loss_weight": 0.125,
        },
        "train": {"per_device_train_batch_size": 1, "max_steps": 2, "train_sampling_strategy": "sequential"},
    }
    single = run(recipe(tmp_path, one / "model", "single", **weighted))
    both = together(recipe(tmp_path, one / "model", "two", distributed={"strategy": "ddp"}, **weighted))
    assert [each.returncode for each in both] == [0, 0], both[0].stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "single"), abs=1e-5)
    norms = [[each[3] for each in report(tmp_path / name)["loss"]["history"]] for name in ("two", "single")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert report(tmp_path / "two")["tokens"] == single.tokens


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_killed_process_ends_the_other_and_one_process_goes_on(strategy: str, one: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, one / "model", "two", distributed={"strategy": strategy})
    first, second = together(path, before=at_step(3, 1, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert second.returncode == -signal.SIGKILL
    assert first.returncode == 7
    assert b"another process of the training ended" in first.stderr
    newest = newest_whole(tmp_path / "two" / "checkpoints")[0]
    assert step_of(newest) == 2
    done = run(recipe(tmp_path, one / "model", "two"), resume=True)
    assert done.resumed_from == [2]
    assert losses(tmp_path / "two") == pytest.approx(losses(one / "one"), abs=2e-3)


def test_two_processes_go_on_from_one_and_a_signal_to_one_stops_both(one: Path, tmp_path: Path) -> None:
    stopped = recipe(tmp_path, one / "model", "run", train={"max_steps": 2})
    run(stopped)
    path = recipe(tmp_path, one / "model", "run", distributed={"strategy": "fsdp2"})
    ended = together(path, "--resume", before=at_step(3, 1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert [each.returncode for each in ended] == [75, 75], ended
    assert b"--resume goes on from step" in ended[0].stderr
    assert step_of(checkpoints_in(tmp_path / "run" / "checkpoints")[-1]) == 4
    again = together(path, "--resume")
    assert [each.returncode for each in again] == [0, 0], again
    assert report(tmp_path / "run")["resumed_from"] == [2, 4]


def test_a_loss_that_is_not_finite_on_one_process_stops_both_and_names_its_rows(one: Path, tmp_path: Path) -> None:
    def spoil(rank: int) -> None:
        compute = QftTrainer.compute_loss

        def spoilt(trainer: QftTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = compute(trainer, model, inputs, *args, **kwargs)
            return loss * torch.nan if rank == 1 and model.training and trainer.state.global_step == 1 else loss

        QftTrainer.compute_loss = spoilt  # type: ignore[method-assign, assignment]

    path = recipe(tmp_path, one / "model", "two", data={"eval_fraction": 0.0})
    first, second = together(path, before=spoil)
    assert (first.returncode, second.returncode, second.stderr) == (8, 8, b"")
    assert b"step 2: the loss is not finite" in first.stderr
    assert first.stderr.count(b"rows.jsonl:") == PASSES // 2 * MICRO


def test_what_fails_before_the_training_is_said_once(one: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, one / "model", "two", data={"max_length": 8})
    first, second = together(path)
    assert first.returncode == second.returncode == 5
    assert second.stderr == b""
    assert not (tmp_path / "two").exists()
