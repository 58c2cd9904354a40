"""calibrate.remedy distill: quantized weights that learn, in the format in which they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qft.documents.calibration import Attempt, CalibrationReport
from qft.errors import RecipeError
from qft.quant.rounding import Scaled, straight_through
from qft.recipe import load
from tests.support.calibrations import calibrated, perplexity, refusal
from tests.support.models import byte_tokenizer, tiny_llama

Recipe = Callable[..., Path]
SCHEMES: dict[str, dict[str, Any]] = {
    "autoround": {"engine": "autoround", "group_size": 32, "samples": 8},
    "nf4": {"engine": "bitsandbytes", "data_type": "nf4"},
}


@pytest.fixture
def sharp(tmp_path: Path) -> dict[str, Any]:
    """A model that is surer of what follows than random weights are, so that rounding them matters."""
    model = tiny_llama()
    model.get_output_embeddings().weight.data *= 20
    model.save_pretrained(tmp_path / "sharp")
    byte_tokenizer().save_pretrained(tmp_path / "sharp")
    return {"path": str(tmp_path / "sharp"), "device": "cpu"}


def distilled(steps: int, kl: float, **more: Any) -> dict[str, Any]:
    own = {"remedy": "distill", "samples": 8, "distill_steps": steps, "distill_learning_rate": 2e-4}
    return {"accept": {"kl": kl}, **own, **more}


def attempts(folder: Path) -> list[Attempt]:
    """Of a calibration that was refused."""
    return CalibrationReport(**json.loads((folder / "report.json").read_text())).attempts


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_result_that_is_refused_learns_and_is_judged_again(
    scheme: str, recipe: Recipe, sharp: dict[str, Any], tmp_path: Path
) -> None:
    own = SCHEMES[scheme]
    first = calibrated(recipe(model=sharp, calibrate=own)).attempts[0]
    learns = distilled(10, first.kl_mean * 0.95, distill_learning_rate=5e-4)
    path = recipe(model=sharp, output_dir=str(tmp_path / "better"), calibrate=own | learns)
    report = calibrated(path)
    before, after = report.attempts
    assert (before, after.distilled_steps, after.kept) == (first, 10, {})
    assert after.weight_bytes == pytest.approx(before.weight_bytes, abs=64)  # but for the header
    assert report.accepted
    assert perplexity(report, path) == pytest.approx(after.perplexity.value, rel=1e-3)


@pytest.mark.parametrize(
    "own",
    [{"engine": "autoround", "group_size": 32, "iters": 4}, {"preset": "w8a8-dynamic", "engine": "rtn"}],
    ids=["tuned rounding", "w8a8 dynamic"],
)
def test_it_starts_from_what_the_calibration_made(own: dict[str, Any], recipe: Recipe, tmp_path: Path) -> None:
    """Where nothing is learnt, nothing is changed; where steps are made, something is."""
    for name, section in {
        "still": distilled(1, 0.0, distill_learning_rate=1e-12),
        "moved": distilled(5, 0.0, distill_learning_rate=1e-2),
    }.items():
        refusal(recipe(output_dir=str(tmp_path / name), calibrate=own | section))
    before, still_is = attempts(tmp_path / "still")
    assert still_is == before.model_copy(update={"distilled_steps": 1})
    assert attempts(tmp_path / "moved")[1].kl_mean != before.kl_mean


def test_it_takes_smaller_steps_where_less_is_lost(recipe: Recipe, sharp: dict[str, Any], tmp_path: Path) -> None:
    """Of 8 bits, which lose next to nothing, steps of 1e-3 make more than they mend."""
    for name, rate in {"auto": "auto", "large": 1e-3}.items():
        own = {"bits": 8} | distilled(10, 0.0, distill_learning_rate=rate)
        refusal(recipe(model=sharp, output_dir=str(tmp_path / name), calibrate=own))
    before, by_auto = attempts(tmp_path / "auto")
    same, by_large = attempts(tmp_path / "large")
    assert same == before
    assert by_auto.kl_mean < before.kl_mean * 1.2
    assert by_large.kl_mean > before.kl_mean * 1.5


def test_a_resumed_calibration_learns_to_the_same_bits(recipe: Recipe, sharp: dict[str, Any]) -> None:
    own = {"engine": "autoround", "group_size": 32, "iters": 2}  # which draws numbers
    path = recipe(model=sharp, calibrate=own | distilled(10, 0.0))
    refusal(path)
    first, learnt = attempts(path.parent / "run")
    limit = (first.kl_mean + learnt.kl_mean) / 2
    assert learnt.kl_mean < first.kl_mean
    resumed = calibrated(recipe(model=sharp, calibrate=own | distilled(10, limit)), resume=True)
    assert resumed.attempts == [first, learnt]


def test_scales_that_stay_reach_what_is_held_and_pass_gradients_on() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 64, generator=draw).bfloat16()
    scale = (torch.rand(6, 2, generator=draw) * 0.2 + 0.1).bfloat16()
    codes = torch.randint(-8, 8, (6, 64), generator=draw)
    held = (codes.reshape(6, 2, 32) * scale[..., None]).flatten(-2)
    rounding = Scaled.reaching(4, scale, weight, held)
    assert torch.equal(rounding(weight).values, held)
    assert rounding(weight).values.dtype == torch.bfloat16
    plain = Scaled.reaching(4, scale, held, held)
    assert plain.shift is None
    leaf = torch.tensor([[0.1, 5.0, -5.0, 0.0]], requires_grad=True)
    straight_through(leaf, Scaled(4, torch.full((1, 1), 0.25))).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[1.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"engine": "torchao", "bits": 8}, "trains no 8-bit weights as torchao"),
        ({"engine": "bitsandbytes", "bits": 8, "activations": "dynamic"}, "trains no 8-bit weights as bitsandbytes"),
        ({"engine": "bitsandbytes", "data_type": "fp4"}, "data_type is fp4"),
        ({"preset": "fp8"}, "data_type is float"),
        ({"group_size": 32, "symmetric": False}, "zero points"),
        ({"preset": "w8a8-static"}, "static activations"),
        ({"engine": "llmcompressor", "engine_python": "/usr/bin/python3"}, "the whole model at once"),
    ],
    ids=str,
)
def test_what_cannot_learn_is_refused_with_the_reason(own: dict[str, Any], message: str, recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=f"calibrate.remedy: .*{message}"):
        load(recipe(calibrate=own | {"accept": {"kl": 0.1}, "remedy": "distill"}))


@pytest.mark.parametrize("field", ["distill_steps", "distill_learning_rate"])
def test_what_distills_is_read_by_that_remedy_alone(field: str, recipe: Recipe) -> None:
    own = {"accept": {"kl": 0.1}, "remedy": "auto", field: 5}
    with pytest.raises(RecipeError, match=rf"calibrate\.{field}: is read only with calibrate\.remedy distill"):
        load(recipe(calibrate=own))
