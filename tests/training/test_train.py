"""Training of the tiny model, end to end, on the CPU."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qft.errors import NonFiniteError, RecipeError, RunError
from qft.model.load import load_base
from qft.plan import make_plan
from qft.recipe import load
from qft.run.checkpoint import newest_whole
from qft.training.trainer import QftTrainer
from tests.support.architectures import write_model
from tests.support.models import plain_loss
from tests.support.rows import chat, write_jsonl
from tests.support.runs import HARD, MODES, adapter, run

RecipeFile = Callable[..., Path]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_and_its_adapter_reloads_to_the_same_loss(
    mode: str, recipe_file: RecipeFile, chat_file: Path, tmp_path: Path
) -> None:
    path = recipe_file(**MODES[mode], train=HARD, data={"eval": str(chat_file)})
    report = run(path)
    assert report.loss.last < 0.9 * report.loss.first
    assert report.eval.before is not None
    assert report.eval.after is not None
    assert report.eval.after.loss < 0.9 * report.eval.before.loss

    plan = make_plan(load(path))
    model = PeftModel.from_pretrained(load_base(plan.model), tmp_path / "run" / "adapter").eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=plan.training["bf16"]):
        assert plain_loss(model, plan.data.eval) == pytest.approx(report.eval.after.loss, rel=0.02)


def test_all_weights_of_an_unquantized_model_train(recipe_file: RecipeFile, tiny_model: Path, tmp_path: Path) -> None:
    before = {p.name: hashlib.sha256(p.read_bytes()).digest() for p in tiny_model.iterdir()}
    settings = HARD | {"learning_rate": 3e-3}
    report = run(recipe_file(quant=None, adapter={"kind": "none", "r": ...}, train=settings))
    assert report.loss.last < 0.9 * report.loss.first
    assert report.model.trainable_share == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.dtype == torch.float32
    assert {p.name: hashlib.sha256(p.read_bytes()).digest() for p in tiny_model.iterdir()} == before


def test_determinism_ends_with_the_training_that_asked_for_it(recipe_file: RecipeFile) -> None:
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    run(recipe_file(train={"full_determinism": True, "max_steps": 1}))
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == before
    torch.use_deterministic_algorithms(True, warn_only=True)
    run(recipe_file(train={"max_steps": 1}, output_dir=str(recipe_file().parent / "another")))
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "quant", [None, {"preset": None, "mode": "8bit"}, {"preset": None, "mode": "qat", "target": "int8"}], ids=str
)
def test_a_cpu_trains_float16_and_mixes_it_with_no_bfloat16(
    quant: dict[str, Any] | None, recipe_file: RecipeFile, tmp_path: Path
) -> None:
    model = {"path": str(write_model(tmp_path / "neox", "gpt_neox")), "dtype": "float16"}
    report = run(recipe_file(model=model, quant=quant, train={"max_steps": 1, "gradient_accumulation_steps": 1}))
    assert report.model.dtype == "float16"
    assert math.isfinite(report.loss.last)
    with pytest.raises(RecipeError, match=r"yaml:\d+: train.bf16: a CPU multiplies no float16 with bfloat16"):
        make_plan(load(recipe_file(model=model, quant=quant, train={"bf16": True})))


def test_accumulating_single_rows_equals_one_large_batch(recipe_file: RecipeFile, tmp_path: Path) -> None:
    """The rows differ in length, so a mean over micro-batches would weigh their tokens differently."""
    rows = [chat("count", " ".join(map(str, range(n)))) for n in (1, 2, 4, 8, 12, 3, 20, 5)]
    write_jsonl(tmp_path / "uneven.jsonl", rows)
    weights = []
    for batch, accumulated in ((8, 1), (1, 8)):
        path = recipe_file(
            model={"dtype": "float32"},
            quant=None,
            data={"train": str(tmp_path / "uneven.jsonl")},
            train={
                "max_steps": 1,
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": accumulated,
                "warmup_steps": 0.0,
                "optim": "sgd",
                "learning_rate": 1.0,
            },
            output_dir=str(tmp_path / f"run-{batch}"),
        )
        report = run(path)
        weights.append((report.loss.first, adapter(tmp_path / f"run-{batch}")))
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-5)
    for name, tensor in weights[0][1].items():
        torch.testing.assert_close(tensor, weights[1][1][name], rtol=1e-4, atol=1e-6)


def test_checkpointing_saves_memory_and_changes_nothing_that_is_learnt(recipe_file: RecipeFile, tmp_path: Path) -> None:
    reports = []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        reports.append(run(recipe_file(train={"gradient_checkpointing": checkpointing}, output_dir=str(folder))))
    for name, tensor in adapter(tmp_path / "False").items():
        torch.testing.assert_close(tensor, adapter(tmp_path / "True")[name], rtol=0, atol=0)
    kept, recomputed = reports
    assert kept.checkpointing is None
    assert recomputed.checkpointing is not None
    # Two blocks, 2 x 40 tokens of width 64: at least the inputs of their seven linears, at most some thirty tensors.
    one = 2 * 2 * 40 * 64 * 2
    assert 7 * one < recomputed.checkpointing.saved_bytes < 60 * one
    assert recomputed.checkpointing.cost_share > 0


@pytest.mark.parametrize("mode", ["nf4", "fp4"])
def test_an_evaluation_leaves_later_gradients_as_they_were(mode: str, recipe_file: RecipeFile) -> None:
    from qft.model.adapter import attach_adapter

    plan = make_plan(load(recipe_file(**MODES[mode], adapter={"init_lora_weights": "gaussian"})))
    model = attach_adapter(load_base(plan.model), plan)
    ids = torch.arange(40).reshape(1, 40)

    def gradients() -> list[torch.Tensor]:
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    after = gradients()
    assert len(before) > 0
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_resumed_run_equals_one_that_was_not_interrupted(recipe_file: RecipeFile, tmp_path: Path) -> None:
    settings = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    settings |= {"gradient_accumulation_steps": 1}
    whole = recipe_file("whole.yaml", train=settings | {"max_steps": 6}, output_dir=str(tmp_path / "whole"))
    run(whole)
    for steps in (3, 6):
        part = recipe_file("part.yaml", train=settings | {"max_steps": steps}, output_dir=str(tmp_path / "part"))
        report = run(part, resume=steps == 6)
    assert (report.steps, report.resumed_from) == (6, [3])
    for name, tensor in adapter(tmp_path / "whole").items():
        torch.testing.assert_close(tensor, adapter(tmp_path / "part")[name], rtol=0, atol=0)


def test_a_resumed_run_must_be_the_same_run(recipe_file: RecipeFile, tmp_path: Path, chat_file: Path) -> None:
    run(recipe_file())
    with pytest.raises(RunError, match="nothing to resume"):
        run(recipe_file(), resume=True)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "complete"
    with pytest.raises(RunError, match=r"recipe.yaml:\d+: adapter.r: the run was started with 4, and this"):
        run(recipe_file(adapter={"r": 8}, train={"max_steps": 4}), resume=True)
    write_jsonl(chat_file, [chat("another", "file")] * 16)
    with pytest.raises(RunError, match=r"recipe.yaml:\d+: data.train: .*chats.jsonl has changed"):
        run(recipe_file(train={"max_steps": 4}), resume=True)


def test_the_run_folder_is_never_taken_silently(recipe_file: RecipeFile, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run to resume"):
        run(recipe_file(), resume=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="not empty"):
        run(recipe_file())
    with pytest.raises(RunError, match="not a run of qft"):
        run(recipe_file(), overwrite=True)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


def test_overwrite_replaces_an_earlier_run(recipe_file: RecipeFile, tmp_path: Path) -> None:
    run(recipe_file())
    stale = tmp_path / "run" / "stale"
    stale.touch()
    run(recipe_file(), overwrite=True)
    assert not stale.exists()


def test_a_bad_plan_leaves_an_earlier_run_alone(recipe_file: RecipeFile, tmp_path: Path) -> None:
    run(recipe_file())
    with pytest.raises(Exception, match="built for 512 tokens"):
        run(recipe_file(data={"max_length": 1000}), overwrite=True)
    assert (tmp_path / "run" / "report.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(recipe_file: RecipeFile, tmp_path: Path) -> None:
    settings = {"learning_rate": 1e30, "warmup_steps": 0.0, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(NonFiniteError, match=r"step 2: the (loss|gradient norm) is not finite.*chats\.jsonl:\d+"):
        run(recipe_file(train=settings | {"max_grad_norm": 0.0}))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-1").is_dir()
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "report.json").exists()


def test_skipped_updates_are_counted_and_change_nothing(recipe_file: RecipeFile, tmp_path: Path) -> None:
    settings = {
        "learning_rate": 1e30,
        "warmup_steps": 0.0,
        "max_steps": 4,
        "max_grad_norm": 0.0,
        "weight_decay": 0.1,
        "on_nonfinite": "skip",
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": None,
    }
    report = run(recipe_file(train=settings))
    assert report.skipped_steps == 3
    assert [step for step, *_ in report.loss.history] == [1]
    assert any("3 updates were skipped" in line for line in report.advice)
    first = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-1" / "adapter_model.safetensors")
    for name, tensor in adapter(tmp_path / "run").items():
        torch.testing.assert_close(tensor, first[name], rtol=0, atol=0)


def test_what_is_told_a_step_later_is_the_same(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, which leaves an update out before the host knows of it."""
    settings = {"learning_rate": 1e30, "warmup_steps": 0.0, "max_steps": 4, "max_grad_norm": 0.0, "weight_decay": 0.1}
    saving = {"on_nonfinite": "skip", "save_strategy": "steps", "save_steps": 3}
    skipping, state = recipe_file(train=settings | saving), tmp_path / "run/checkpoints/checkpoint-3/trainer_state.json"
    at_once, adapters = run(skipping), [adapter(tmp_path / "run")]
    logged = json.loads(state.read_text())["log_history"]
    monkeypatch.setattr(QftTrainer, "_waits_for_nothing", lambda self: True)
    later = run(skipping, overwrite=True)
    adapters.append(adapter(tmp_path / "run"))
    assert at_once.skipped_steps == later.skipped_steps == 3
    assert at_once.loss == later.loss
    assert len(logged) == 3
    assert str(json.loads(state.read_text())["log_history"]) == str(logged)  # NaN is not equal to itself
    assert all(torch.equal(adapters[1][name], value) for name, value in adapters[0].items())
    with pytest.raises(NonFiniteError, match=r"step 2: the (loss|gradient norm) is not finite.*chats\.jsonl:\d+"):
        run(recipe_file(train=settings), overwrite=True)


def test_the_evaluated_loss_counts_tokens_and_ignores_smoothing(recipe_file: RecipeFile, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "held.jsonl", [chat("a", "b" * n) for n in (1, 30, 60, 2, 5)])
    path = recipe_file(
        model={"dtype": "float32"},
        quant=None,
        data={"eval": str(tmp_path / "held.jsonl")},
        train={"label_smoothing_factor": 0.3, "per_device_eval_batch_size": 2},
    )
    report = run(path)
    plan = make_plan(load(path))
    assert report.eval.before is not None
    assert report.eval.before.loss == pytest.approx(plain_loss(load_base(plan.model), plan.data.eval), rel=1e-5)
    assert report.eval.before.perplexity == pytest.approx(math.exp(report.eval.before.loss))


def test_early_stopping_and_the_best_checkpoint(recipe_file: RecipeFile, tmp_path: Path) -> None:
    """What is learnt makes the held-out answers less likely, so the first evaluation stays the best one."""
    write_jsonl(tmp_path / "held.jsonl", [chat("say", "QWXZ" * 4)] * 4)
    cadence = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings = HARD | cadence | {"load_best_model_at_end": True, "early_stopping_patience": 2, "learning_rate": 3e-2}
    report = run(recipe_file(train=settings, data={"eval": str(tmp_path / "held.jsonl")}))
    losses = [evaluation.loss for evaluation in report.eval.history]
    assert report.steps == len(losses) == losses.index(min(losses)) + 3 < 12
    assert report.eval.after is not None
    assert report.eval.after.loss == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changed_its_base_is_saved_for_the_original(
    init: str, recipe_file: RecipeFile, chat_file: Path, tmp_path: Path
) -> None:
    path = recipe_file(
        model={"dtype": "float32"},
        quant=None,
        adapter={"init_lora_weights": init},
        train=HARD | {"learning_rate": 1e-3},
        data={"eval": str(chat_file)},
    )
    report = run(path)
    assert newest_whole(tmp_path / "run" / "checkpoints")[0]  # more steps can follow
    assert not list((tmp_path / "run" / "adapter").glob("initial*"))
    plan = make_plan(load(path))
    model = PeftModel.from_pretrained(load_base(plan.model), tmp_path / "run" / "adapter").eval()
    assert report.eval.after is not None
    assert plain_loss(model, plan.data.eval) == pytest.approx(report.eval.after.loss, rel=1e-4)


def test_loftq_starts_nearer_to_the_original_weights(recipe_file: RecipeFile, tiny_model: Path) -> None:
    import bitsandbytes as bnb

    from qft.model.adapter import attach_adapter

    plan = make_plan(load(recipe_file(adapter={"init_lora_weights": "loftq", "r": 16, "lora_alpha": 8.0})))
    model = attach_adapter(load_base(plan.model), plan)
    original = load_file(tiny_model / "model.safetensors")
    compared = 0
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if base is None:
            continue
        wanted = original[name.removeprefix("base_model.model.") + ".weight"]
        held = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).float()
        update = module.get_delta_weight("default")
        assert (wanted - held - update).norm() < 0.9 * (wanted - held).norm()
        compared += 1
    assert compared == 14


@pytest.mark.pictures
def test_generated_answers_are_scored_and_kept(recipe_file: RecipeFile, chat_file: Path, tmp_path: Path) -> None:
    rows = [chat("hi", "yo")] * 4
    write_jsonl(tmp_path / "one.jsonl", rows)
    report = run(
        recipe_file(
            quant=None,
            model={"dtype": "float32"},
            data={"train": str(tmp_path / "one.jsonl"), "eval": str(tmp_path / "one.jsonl")},
            train=HARD | {"max_steps": 40, "learning_rate": 2e-2, "per_device_train_batch_size": 1},
            eval={"metrics": ["exact_match", "regex"], "regex": "^y", "max_new_tokens": 8, "samples": 3},
        )
    )
    assert report.eval.before is not None
    assert report.eval.before.scores == {"exact_match": 0.0, "regex": 0.0}
    assert report.eval.after is not None
    assert report.eval.after.scores == {"exact_match": 1.0, "regex": 1.0}
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "<path" in page
    lines = (tmp_path / "run" / "answers" / "after.jsonl").read_text().splitlines()
    assert [json.loads(line)["given"] for line in lines] == ["yo"] * 3


def test_the_run_folder_tells_what_was_done(recipe_file: RecipeFile, tmp_path: Path, chat_file: Path) -> None:
    report = run(recipe_file(train={"report_to": ...}))
    folder = tmp_path / "run"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["data"] == {str(chat_file): hashlib.sha256(chat_file.read_bytes()).hexdigest()}
    assert len(manifest["base"]["sha256"]["model.safetensors"]) == 64
    assert manifest["versions"]["torch"] == torch.__version__
    assert load(folder / "recipe.yaml").recipe.train.max_steps == 2
    assert list(folder.glob("events/*tfevents*"))
    assert not list(folder.glob("checkpoints/runs"))
    assert json.loads((folder / "report.json").read_text()) == report.model_dump(mode="json")


def test_the_report_adds_up(recipe_file: RecipeFile) -> None:
    report = run(recipe_file(train={"max_steps": 6}))
    assert report.steps == 6
    assert report.samples == 24
    assert report.tokens > report.supervised_tokens > 0
    assert sum(report.phases.model_dump().values()) == pytest.approx(1)
    parts = report.memory.components
    # Each LoRA weight is float32: as many gradients as weights, and two moments of AdamW.
    assert parts.gradients == parts.trainable_weights == report.model.trainable_parameters * 4
    assert parts.optimizer_state >= 2 * parts.gradients
    assert 0 < report.model.bits_per_weight < 32
    assert report.throughput.step_seconds_p50 <= report.throughput.step_seconds_p95
    assert parts.activations is None  # of a CPU: what its allocator keeps cannot be told apart
    assert parts.undivided is not None
    memory = report.memory
    assert memory.leak is None
    assert not memory.growing
    assert list(memory.moments) == ["before_load", "after_load", "after_adapters", "after_first_step", "at_end"]
    assert list(memory.phases) == ["prepare", "load", "adapters", "train", "save"]
    known = sum(parts.model_dump(exclude_none=True).values())
    assert known == memory.phases["train"].host_resident_bytes <= memory.peak_host_bytes
