"""Training on a CUDA device: every way to hold the base, and what only a GPU has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qft.commands.calibrate import calibrate
from qft.commands.evaluate import EvalOptions, evaluate
from qft.commands.train import train
from qft.export import export
from qft.model.adapter import attach_adapter
from qft.model.load import load_base
from qft.plan import make_plan
from qft.progress import Step, View
from qft.recipe import load
from tests.support.exports import options
from tests.support.known import known
from tests.support.models import plain_loss
from tests.support.runs import HARD, MODES, adapter, trained

pytestmark = pytest.mark.gpu

RecipeFile = Callable[..., Path]
QUIET: dict[str, Any] = {"report_to": []}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_mode_learns_on_a_gpu(mode: str, checkpointing: bool, recipe_file: RecipeFile, chat_file: Path) -> None:
    sections: dict[str, Any] = {"model": {"device": "cuda"}, **MODES[mode]}
    sections["model"] = {"device": "cuda", **MODES[mode].get("model", {})}
    path = recipe_file(
        **sections,
        train=HARD | QUIET | {"gradient_checkpointing": checkpointing, "optim": "paged_adamw_8bit"},
        data={"eval": str(chat_file)},
    )
    report = train(load(path), View())
    assert report.loss.last < 0.9 * report.loss.first
    assert report.memory.peak_gpu_bytes > report.memory.components.base_weights > 0
    assert (report.memory.components.activations or 0) > 0
    assert sum(report.phases.model_dump().values()) == pytest.approx(1)


def test_fp16_with_loss_scaling_learns(recipe_file: RecipeFile) -> None:
    path = recipe_file(
        model={"device": "cuda", "dtype": "float16"},
        quant={"compute_dtype": "float16"},
        train=HARD | QUIET | {"fp16": True, "max_steps": 24},
    )
    report = train(load(path), View())
    assert report.loss.last < 0.9 * report.loss.first


def test_answers_are_generated_on_the_gpu(recipe_file: RecipeFile, chat_file: Path) -> None:
    path = recipe_file(
        model={"device": "cuda"},
        data={"eval": str(chat_file)},
        train=QUIET,
        eval={"metrics": ["exact_match"], "max_new_tokens": 8},
    )
    report = train(load(path), View())
    assert report.eval.after is not None
    assert report.eval.after.scores.keys() == {"exact_match"}


def test_cpu_and_gpu_agree_on_the_gradients(recipe_file: RecipeFile) -> None:
    gradients = []
    for device in ("cpu", "cuda"):
        path = recipe_file(
            model={"device": device, "dtype": "float32"},
            quant={"compute_dtype": "float32"},
            adapter={"init_lora_weights": "gaussian"},
            train=QUIET | {"tf32": False} if device == "cuda" else QUIET,
        )
        plan = make_plan(load(path))
        torch.manual_seed(0)
        model = attach_adapter(load_base(plan.model), plan).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    generator = torch.Generator().manual_seed(len(name))
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        ids = torch.arange(40, device=device).reshape(1, 40)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
    one, other = gradients
    cosine = torch.nn.functional.cosine_similarity(one, other, dim=0)
    assert cosine > 0.9999


def test_the_evaluated_loss_on_a_gpu_is_the_plain_one(recipe_file: RecipeFile, chat_file: Path) -> None:
    path = recipe_file(
        model={"device": "cuda", "dtype": "float32"}, quant=None, data={"eval": str(chat_file)}, train=QUIET
    )
    report = train(load(path), View())
    plan = make_plan(load(path))
    model = load_base(plan.model).cpu()
    assert report.eval.before is not None
    assert report.eval.before.loss == pytest.approx(plain_loss(model, plan.data.eval), rel=1e-3)


def test_models_are_compared_on_the_gpu(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    names = [f"{tiny_model}@{variant}" for variant in ("float32", "nf4", "8bit")]
    options = EvalOptions(data=str(text), reference=names[0], window=128, stride=64, layers=True)
    reference, nf4, int8 = evaluate(names, options, View()).targets
    assert nf4.kl_mean is not None
    assert int8.kl_mean is not None
    assert 0 < int8.kl_mean < nf4.kl_mean
    assert known(nf4.weight_bytes) < known(int8.weight_bytes) < known(reference.weight_bytes)
    assert known(reference.weight_bytes) <= known(reference.peak_bytes)
    assert len(nf4.layers) == 15


@pytest.mark.parametrize(
    "own",
    [
        {"preset": "fp8"},
        {"preset": "fp8", "activations": "static", "samples": 4},
        {"preset": "w8a8-static", "samples": 4},
        {"engine": "autoround", "group_size": 32, "samples": 4, "iters": 2},
        {"engine": "bitsandbytes", "data_type": "nf4"},
        {"engine": "bitsandbytes", "bits": 8, "activations": "dynamic"},
    ],
)
def test_a_calibration_on_a_gpu_loads_as_what_was_measured(own: dict[str, Any], recipe_file: RecipeFile) -> None:
    if own.get("engine") == "autoround":
        pytest.importorskip("auto_round", reason="needs auto-round (pip install 'qft[calibrate]')")
    path = recipe_file(
        model={"device": "cuda"},
        quant=None,
        adapter=None,
        train=None,
        data={"eval_fraction": 0.5},
        calibrate={"max_length": 32, **own},
    )
    report = calibrate(load(path), View())
    assert report.peak_bytes > 0
    [attempt] = report.attempts
    held_out = str(path.parent / "chats.jsonl")
    result = evaluate([report.result or ""], EvalOptions(data=held_out), View()).targets[0]
    # Of all rows, not the held-out half alone: a random model finds them equally unlikely.
    assert result.perplexity == pytest.approx(attempt.perplexity.value, rel=0.05)


@pytest.mark.parametrize("quant", [{"preset": "finetune"}, {"mode": "8bit"}], ids=["nf4", "int8"])
def test_what_was_trained_on_a_gpu_is_handed_over(quant: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    """Merged into the values that the GPU's kernels made of the base, and loaded again there; GGUF by llama.cpp."""
    pytest.importorskip("cyllama", reason="needs llama.cpp (pip install 'qft[llamacpp]')")
    run = trained(tmp_path, tiny_model, model={"device": "cuda"}, quant=quant)
    documents = export(run, options("adapter", "merged", "bnb-8bit", "gguf", "gguf-f16"), View())
    assert all(document.passed for document in documents)
    [kl] = [check.value for check in documents[1].gate.checks if check.name == "kl"]
    assert isinstance(kl, float)
    assert kl < 0.001


class Cut(View):
    """Ends the process, as it were, two steps behind a checkpoint."""

    def step(self, step: Step) -> None:
        if step.step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"optim": "paged_adamw_8bit"}},
        {"train": {"optim": "adamw_torch_fused", "gradient_checkpointing": True}},
        {"train": {"fp16": True}, "quant": {"compute_dtype": "float16"}, "model": {"dtype": "float16"}},
        {"train": {"matmul": "fp8"}, "adapter": {"lora_dropout": 0.0}},
    ],
    ids=["paged", "fused and checkpointed", "float16 with loss scaling", "float8"],
)
def test_a_resumed_run_is_the_unbroken_one_on_a_gpu(
    sections: dict[str, Any], recipe_file: RecipeFile, tmp_path: Path
) -> None:
    """Dropout draws from the device's random numbers, and the scaler of float16 has a state of its own."""
    steps = QUIET | {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "full_determinism": True}
    paths = [
        recipe_file(
            f"{name}.yaml",
            model={"device": "cuda", **sections.get("model", {})},
            quant={"preset": "finetune", **sections.get("quant", {})},
            adapter={"lora_dropout": 0.2, **sections.get("adapter", {})},
            train=steps | sections["train"],
            output_dir=str(tmp_path / name),
        )
        for name in ("whole", "part")
    ]
    whole = train(load(paths[0]), View())
    with pytest.raises(KeyboardInterrupt):
        train(load(paths[1]), Cut())
    resumed = train(load(paths[1]), View(), resume=True)
    assert resumed.resumed_from == [3]
    assert resumed.loss == whole.loss
    for name, tensor in adapter(tmp_path / "whole").items():
        torch.testing.assert_close(tensor, adapter(tmp_path / "part")[name], rtol=0, atol=0)
