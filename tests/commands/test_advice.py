"""`qft eval RUN --advise`: each remedy with figures that suggest it, and with figures that do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from safetensors.torch import load_file

from qft.commands.advice import Facts, advise, deployed_as
from qft.commands.evaluate import EvalOptions, evaluate
from qft.documents.evaluation import Advice, EvalDocument
from qft.documents.training import Evaluation, Evaluations, Loss, Report, read_report
from qft.errors import QftError
from qft.measure.likelihood import Likelihood
from qft.progress import View
from qft.recipe import load
from qft.views.html.page import evaluation_page
from qft.views.words import recipe_lines
from tests.support.known import known
from tests.support.once import once
from tests.support.runs import trained

SEED = np.random.default_rng(0)
ROWS = SEED.uniform(20.0, 60.0, 64)
"""Negative log likelihoods of rows, in nats."""


def likelihood(factor: float = 1.0, noise: float = 0.0) -> Likelihood:
    """Of rows that a model finds less likely by `factor`, and by chance by `noise` nats."""
    nll = ROWS * factor + noise * np.random.default_rng(1).standard_normal(len(ROWS))
    return Likelihood(nll, np.full(len(ROWS), 10))


@pytest.fixture(scope="session")
def fp4_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run on an fp4 base."""

    def make(folder: Path) -> None:
        trained(folder, tiny_model, quant={"preset": "finetune", "quant_type": "fp4"}, eval={"metrics": []})

    return once(tmp_path_factory, "advised-fp4", make) / "run"


@pytest.fixture(scope="session")
def document(fp4_run: Path) -> EvalDocument:
    return evaluate([str(fp4_run)], EvalOptions(advise=True, batch_size=16), View())


def facts(run: Path, **changes: Any) -> Facts:
    """Of a run in which nothing is amiss, with `changes`."""
    recipe = load(run / "recipe.yaml").recipe
    for name in ("quant", "train", "adapter", "export"):
        recipe = recipe.having(**{name: getattr(recipe, name).having(**changes.pop(name, {}))})
    report = read_report(run)
    losses = [(step, 2.0 - step / 30, 1e-3, 0.5) for step in range(1, 31)]
    fine = report.model_copy(
        update={
            "loss": Loss(first=2.0, last=1.0, lowest=1.0, spikes=0, history=losses),
            "eval": Evaluations(before=evaluation(0, 2.0), after=evaluation(30, 1.0)),
        }
    )
    figures: dict[str, Any] = {"report": fine, "own": likelihood(), "base": likelihood(1.2)}
    return Facts(recipe, **figures | changes)


def evaluation(step: int, loss: float) -> Evaluation:
    return Evaluation(step=step, loss=loss, perplexity=np.exp(loss), tokens=100, rows=10)


def report(run: Path, **loss: Any) -> Report:
    """Of as many steps as `norms` has."""
    fine = facts(run).report
    return fine.model_copy(update={"loss": fine.loss.model_copy(update=loss), "steps": 30})


def history(*losses: float) -> Evaluations:
    """Held-out losses at steps 10, 20, …, the last of them after the training."""
    steps = [evaluation(10 * number, loss) for number, loss in enumerate(losses, 1)]
    return Evaluations(before=evaluation(0, 2.0), after=steps[-1], history=steps[:-1])


def norms(*, clipped: int, norm: float) -> list[tuple[int, float, float, float]]:
    return [(step, 1.0, 1e-3, norm if step <= clipped else 0.5) for step in range(1, 31)]


FP4, QAT = {"quant_type": "fp4"}, {"preset": None, "mode": "qat", "target": "int4-g32"}
BARE = {"bare": likelihood(1.1)}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name: the advice, what suggests it, what does not
    "fp4": ("nf4", {"quant": FP4, "others": BARE | {"nf4": likelihood(1.05)}}, {"others": BARE}),
    "fp4 that costs nothing": (
        "nf4",
        {"quant": FP4, "others": BARE | {"nf4": likelihood(1.05)}},
        {"quant": FP4, "others": BARE | {"nf4": likelihood(1.1, noise=2.0)}},
    ),
    "scales": (
        "double_quant",
        {"others": BARE | {"single": likelihood(1.09)}},
        {"others": BARE | {"single": likelihood(1.1, noise=2.0)}},
    ),
    "layers": (
        "skip_modules",
        {"others": BARE | {"kept": likelihood(1.02)}, "kept": ["a", "b"]},
        {"others": BARE | {"kept": likelihood(1.11)}, "kept": ["a", "b"]},
    ),
    "rounding": ("qat", {"others": {"rounded": likelihood(1.05)}}, {"others": {"rounded": likelihood(1.0, noise=2.0)}}),
    "rounding, distilled": (
        "distill", {"others": {"rounded": likelihood(1.05)}}, {"others": {"rounded": likelihood()}},
    ),
    "qat that lost": (
        "distill", {"quant": QAT, "base": likelihood(0.9)}, {"quant": QAT, "base": likelihood(1.2)},
    ),
    "qat that distils": (
        "distill",
        {"quant": QAT, "base": likelihood(0.9)},
        {"quant": QAT | {"distill": True}, "base": likelihood(0.9)},
    ),
    "float16": (
        "float16",
        {"dtype": "float16", "largest": ("model.layers.0", 7e4)},
        {"dtype": "float16", "largest": ("model.layers.0", 6e4)},
    ),
    "float16 that nobody uses": (
        "float16",
        {"export": {"target": ["gguf-f16"]}, "largest": ("model.layers.0", 7e4)},
        {"dtype": "bfloat16", "largest": ("model.layers.0", 7e4)},
    ),
    "rank": ("rank", {"weak_half": 0.3}, {"weak_half": 0.05}),
}  # fmt: skip


def named(run: Path, name: str, changes: dict[str, Any]) -> list[Advice]:
    return [advice for advice in advise(facts(run, **changes)) if advice.name == name]


@pytest.mark.parametrize("case", CASES)
def test_a_remedy_is_advised_by_its_figure_alone(case: str, fp4_run: Path) -> None:
    name, amiss, fine = CASES[case]
    [advice] = named(fp4_run, name, amiss)
    assert not named(fp4_run, name, fine)
    assert not advise(facts(fp4_run))
    assert advice.figures
    loaded = load(fp4_run / "recipe.yaml")
    sections: dict[str, dict[str, Any]] = {}
    for field, value in advice.recipe.items():
        section, _, key = field.partition(".")
        sections.setdefault(section, {})[key] = value
    loaded.having(**sections)  # the lines are a recipe's


def test_clipping_and_spikes_and_a_loss_that_rose(fp4_run: Path) -> None:
    def of(name: str, **changes: Any) -> list[Advice]:
        return named(fp4_run, name, changes)

    [clipped] = of("clipping", report=report(fp4_run, history=norms(clipped=15, norm=4.0)))
    assert clipped.figures == {"share": 0.5, "median_norm": 4.0, "max_grad_norm": 1.0}
    assert clipped.recipe == {"train.max_grad_norm": 4.0}
    assert "50% of the steps" in clipped.finding
    assert "25% of their gradient" in clipped.gain
    assert not of("clipping", report=report(fp4_run, history=norms(clipped=5, norm=4.0)))
    never = {"train": {"max_grad_norm": 0.0}}
    assert not of("clipping", report=report(fp4_run, history=norms(clipped=15, norm=4.0)), **never)

    jumps = [(step, 3.0 if step % 5 == 0 else 1.0, 1e-3, 0.5) for step in range(1, 31)]
    [spiked] = of("learning_rate", report=report(fp4_run, spikes=6, history=jumps))
    assert (spiked.figures["rise"], spiked.recipe) == (2.0, {"train.learning_rate": 0.01})
    assert not of("learning_rate", report=report(fp4_run, spikes=1, history=jumps))

    fine = report(fp4_run)
    [late] = of("learning_rate", report=fine.model_copy(update={"eval": history(1.5, 1.0, 1.3)}))
    assert (late.figures["lowest"], late.figures["last"], late.figures["step"]) == (1.0, 1.3, 20)
    assert not of("learning_rate", report=fine.model_copy(update={"eval": history(1.5, 1.2, 1.0)}))
    assert not of("rank", weak_half=0.3, report=fine.model_copy(update={"eval": history(1.5, 1.0, 1.3)}))


def test_the_gain_is_what_was_measured(fp4_run: Path) -> None:
    better = {"bare": likelihood(1.1), "nf4": likelihood(1.05)}
    [advice] = named(fp4_run, "nf4", {"quant": FP4, "others": better, "more_bytes": {"nf4": 2**20}})
    change = float(better["nf4"].perplexity() / better["bare"].perplexity() - 1)
    assert advice.figures["perplexity_change"] == pytest.approx(change)
    assert advice.figures["low"] < change < advice.figures["high"] < 0
    assert f"{change:+.1%}" in advice.gain
    assert "+1.0 MiB" in advice.gain
    [qat] = named(fp4_run, "qat", {"others": {"rounded": likelihood(1.05)}})
    most = float(likelihood().perplexity() / likelihood(1.05).perplexity() - 1)
    assert f"at most {most:+.1%}" in qat.gain


def test_a_run_is_held_otherwise_and_measured(document: EvalDocument, fp4_run: Path, tmp_path: Path) -> None:
    """On an fp4 base, whose nf4 twin is nearer to the unquantized model."""
    names = [target.name.removeprefix(str(fp4_run)).strip() for target in document.targets]
    assert names == [
        "@base", "", "without its adapter", "in nf4", "with scales in 32 bits", "rounded to int4-g32",
        "with its worst layers in 16 bits",
    ]  # fmt: skip
    by_name = dict(zip(names, document.targets, strict=True))
    kls = {name: target.kl_mean or 0.0 for name, target in by_name.items()}
    assert kls["in nf4"] < kls["without its adapter"]
    assert kls["with its worst layers in 16 bits"] < kls["without its adapter"]
    ways = {
        "nf4": ("without its adapter", "in nf4"),
        "double_quant": ("without its adapter", "with scales in 32 bits"),
        "skip_modules": ("without its adapter", "with its worst layers in 16 bits"),
        "qat": ("", "rounded to int4-g32"),
    }
    measured = [advice for advice in document.advice if advice.name in ways]
    assert measured
    for advice in measured:
        before, after = (known(by_name[name].perplexity) for name in ways[advice.name])
        assert advice.figures["perplexity_change"] == pytest.approx(after / before - 1)
    page = evaluation_page(document)
    for advice in document.advice:
        assert advice.gain.split("[")[0] in page
    Draft202012Validator(EvalDocument.model_json_schema()).validate(document.model_dump(mode="json"))


def test_weak_directions_and_largest_values_are_those_of_the_definition(fp4_run: Path, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    from qft.commands.advising import largest_output, weak_half

    tensors = load_file(fp4_run / "adapter" / "adapter_model.safetensors")
    energy = weak = 0.0
    for name, a in tensors.items():
        if "lora_A" in name:
            s = torch.linalg.svdvals((tensors[name.replace("lora_A", "lora_B")] @ a).double()).square()
            energy, weak = energy + float(s.sum()), weak + float(s[2:].sum())
    assert weak_half(fp4_run / "adapter") == pytest.approx(weak / energy, rel=1e-4)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.model.layers[1].mlp.down_proj.weight.data *= 1e8
    ids = torch.arange(8)[None]
    found = largest_output(model, [{"input_ids": ids}])
    assert found is not None
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    assert found[1] >= float(max(h.abs().max() for h in hidden[:2]))
    assert found[1] > 65504


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (["{run}", "{run}@base"], {}, "advice is on one run"),
        (["{run}@base"], {}, "advice is on one run"),
        (["{model}"], {"data": "text.txt"}, "advice is on one run"),
        (["{run}"], {"reference": "{run}@base"}, "leave --reference away"),
    ],
)
def test_what_cannot_be_advised_on_is_refused(
    targets: list[str], options: dict[str, str], message: str, fp4_run: Path, tiny_model: Path
) -> None:
    names = [name.format(run=fp4_run, model=tiny_model) for name in targets]
    given: dict[str, Any] = {name: value.format(run=fp4_run) for name, value in options.items()}
    with pytest.raises(QftError, match=message):
        evaluate(names, EvalOptions(advise=True, **given), View())


def test_the_format_of_the_deployment_is_the_recipes(recipe_file: Callable[..., Path]) -> None:
    assert deployed_as(load(recipe_file(export={"target": ["merged", "gguf-q4_0"]})).recipe) == "q4_0"
    assert deployed_as(load(recipe_file(export={"target": ["merged"]})).recipe) == "int4-g32"


def test_lines_are_those_of_a_recipe() -> None:
    lines = recipe_lines({"quant.mode": "qat", "quant.distill": True, "adapter.r": 32})
    assert lines == ["quant:", '  mode: "qat"', "  distill: true", "adapter:", "  r: 32"]
