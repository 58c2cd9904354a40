"""`qft calibrate` by engines that quantize the whole model at once: a quantizer from outside the package."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PACKAGE_MODEL, byte_tokenizer, tiny_llama
from safetensors.torch import load_file
from test_calibrate import calibrated, held_out, recipe, refusal, weights
from test_cli import qft
from test_plugin import changed, custom, plugin

from qft.calibrate import calibrate
from qft.errors import GateError, ModelError, RecipeError, RunError
from qft.evaluate import EvalOptions, evaluate
from qft.recipe import load
from qft.report.calibration import CalibrationReport
from qft.report.live import View
from qft.train import train

__all__ = ["plugin", "recipe"]  # fixtures

Recipe = Callable[..., Path]
SCORES = {"metrics": ["exact_match"], "max_new_tokens": 4, "batch_size": 4, "samples": 4}


@pytest.fixture
def own(recipe: Recipe, plugin: Path) -> Recipe:
    """Writes a recipe that calibrates the tiny model by mine.py; sections as in `recipe`."""

    def write(name: str = "recipe.yaml", **sections: Any) -> Path:
        quant, calibrate = sections.pop("quant", {}), sections.pop("calibrate", {})
        return recipe(name, quant=custom(plugin.name) | quant, calibrate={"engine": "custom", **calibrate}, **sections)

    return write


def result_perplexity(path: Path, report: CalibrationReport, run: Path) -> float:
    """Of the run's model on the verification rows, as `qft eval` loads it by the run's own recipe."""
    return evaluate([str(run)], EvalOptions(data=held_out(report, path)), View()).targets[0].perplexity


def test_a_result_is_accepted_and_loads_again_as_what_was_measured(
    own: Recipe, plugin: Path, tiny_model: Path, tmp_path: Path
) -> None:
    before = weights(tiny_model)
    path = own(calibrate={"accept": {"perplexity_increase": "5%", "kl": 0.1}}, quant={"skip_modules": ["up_proj"]})
    report = calibrated(path)
    run = tmp_path / "run"
    [attempt] = report.attempts
    assert report.accepted
    assert report.result == str(run / "model")
    assert result_perplexity(path, report, run) == pytest.approx(attempt.perplexity.value, rel=1e-3)
    assert attempt.perplexity.value != report.perplexity_before.value
    assert 0 < attempt.kl_mean < 0.1
    assert weights(tiny_model) == before

    assert report.scheme["quant_method"] == "int8_symmetric"
    assert report.quantized_layers == 12
    assert report.skipped_layers == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"]
    assert {layer.name for layer in report.layers}.isdisjoint(report.skipped_layers)
    assert len(report.layers) == 12
    assert all(20 < layer.output_snr_db < 60 for layer in report.layers)
    assert report.layers[0].bytes == 64 * 64 + 4 * 64
    assert attempt.weight_bytes == report.bytes_after == (run / "model" / "model.safetensors").stat().st_size
    assert report.bytes_after < report.bytes_before
    assert report.tokens_per_second == 0
    assert report.peak_bytes > 0

    digest = hashlib.sha256(plugin.read_bytes()).hexdigest()
    known = {"path": str(plugin), "sha256": digest, "method": "int8_symmetric"}
    assert json.loads((run / "manifest.json").read_text())["plugin"] == known
    assert json.loads((run / "plan.json").read_text())["quantization"]["plugin"] == known
    record = json.loads((run / "model" / "calibration.json").read_text())
    assert record["plugin"] == known | {"path": "mine.py"}
    assert not list((run / "model").glob("*.py"))
    assert not (run / "work").exists()
    saved = load_file(run / "model" / "model.safetensors")
    assert saved["model.layers.0.mlp.down_proj.weight"].dtype == torch.int8
    assert saved["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert load(run / "recipe.yaml").recipe.quant.plugin == str(plugin)


def test_a_miss_is_refused_with_its_figures_and_leaves_no_model(own: Recipe, plugin: Path, tmp_path: Path) -> None:
    changed(plugin, "LEVELS = 127", "LEVELS = 3")
    accept = {"kl": 1e-9, "score_drop": "100%"}
    error = refusal(own(calibrate={"accept": accept}, eval=SCORES, data={"eval_fraction": 0.2}))
    assert isinstance(error, GateError)
    assert "kl is" in str(error)
    assert "remedy" not in str(error)
    assert "--resume" not in str(error)
    run = tmp_path / "run"
    report = CalibrationReport(**json.loads((run / "report.json").read_text()))
    assert not report.accepted
    assert report.attempts[0].kl_mean > 1e-5
    assert json.loads((run / "manifest.json").read_text())["status"] == "refused"
    assert not (run / "model").exists()
    assert not (run / "work").exists()


def test_scores_are_those_of_the_result_loaded_by_its_plugin(own: Recipe) -> None:
    report = calibrated(own(calibrate={"accept": {"score_drop": "100%"}}, eval=SCORES, data={"eval_fraction": 0.2}))
    assert [check.name for check in report.checks] == ["score_drop"]
    assert report.scores_before.keys() == report.attempts[0].scores.keys() == {"exact_match"}


def test_a_coarser_plugin_loses_more(own: Recipe, plugin: Path, tmp_path: Path) -> None:
    fine = calibrated(own(model={"dtype": "float32"}))
    changed(plugin, "LEVELS = 127", "LEVELS = 7")
    coarse = calibrated(own(model={"dtype": "float32"}, output_dir=str(tmp_path / "coarse")))
    assert fine.attempts[0].kl_mean < coarse.attempts[0].kl_mean / 10
    assert min(e.output_snr_db for e in fine.layers) > max(e.output_snr_db for e in coarse.layers)
    assert fine.perplexity_before == coarse.perplexity_before


def test_the_figures_are_those_of_block_by_block(own: Recipe, recipe: Recipe, plugin: Path, tmp_path: Path) -> None:
    """Both round to 15 or 16 levels a row."""
    changed(plugin, "LEVELS = 127", "LEVELS = 7")
    float32, rounded = {"dtype": "float32"}, {"bits": 4, "group_size": -1}
    whole = calibrated(own(model=float32))
    streamed = calibrated(recipe("rtn.yaml", model=float32, output_dir=str(tmp_path / "rtn"), calibrate=rounded))
    assert whole.verify_tokens == streamed.verify_tokens
    assert whole.perplexity_before.value == pytest.approx(streamed.perplexity_before.value, rel=1e-5)
    assert whole.attempts[0].kl_mean == pytest.approx(streamed.attempts[0].kl_mean, rel=0.5)
    for one, other in zip(whole.layers, streamed.layers, strict=True):
        assert one.name == other.name
        assert one.output_snr_db == pytest.approx(other.output_snr_db, abs=3)
        assert one.outlier_share == other.outlier_share


def test_a_run_is_merged_before_it_is_quantized(own: Recipe, recipe_file: Recipe, tmp_path: Path) -> None:
    run, hard = tmp_path / "trained", {"report_to": [], "learning_rate": 0.05}
    train(load(recipe_file("train.yaml", train=hard, output_dir=str(run))), View())
    path = own(model={"path": str(run), "dtype": "float32"})
    report = calibrated(path)
    data = held_out(report, path)
    merged, base = (
        t.perplexity for t in evaluate([f"{run}@merged", f"{run}@base"], EvalOptions(data=data), View()).targets
    )
    assert abs(merged - base) / base > 0.05
    assert report.perplexity_before.value == pytest.approx(merged, rel=0.02)
    assert result_perplexity(path, report, tmp_path / "run") == pytest.approx(
        report.attempts[0].perplexity.value, rel=1e-3
    )
    assert report.attempts[0].perplexity.value == pytest.approx(merged, rel=0.02)


def test_tied_weights_stay_tied(own: Recipe, tmp_path: Path) -> None:
    tiny_llama(num_hidden_layers=1, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    byte_tokenizer().save_pretrained(tmp_path / "tied")
    path = own(model={"path": str(tmp_path / "tied")})
    report = calibrated(path)
    assert report.quantized_layers == 7
    assert "lm_head.weight" not in load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert result_perplexity(path, report, tmp_path / "run") == pytest.approx(
        report.attempts[0].perplexity.value, rel=1e-3
    )


def test_json_is_the_document_and_nothing_else(own: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere"
    ran = qft("calibrate", str(own()), "--out", str(out), "--json")
    assert ran.exit_code == 0, ran.stderr
    assert json.loads(ran.stdout)["result"] == str(out / "model")
    assert "mine.py" in ran.stderr
    told = qft("calibrate", str(own()), "--out", str(out), "--overwrite")
    assert told.exit_code == 0, told.stderr
    assert "custom" in told.stdout
    assert "int8_symmet" in told.stdout  # the column is narrow


def test_there_is_nothing_to_resume(own: Recipe, tmp_path: Path) -> None:
    class Cut(View):
        def note(self, text: str) -> None:
            if text.startswith("Comparing"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(load(own()), Cut())
    run = tmp_path / "run"
    assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"
    assert not (run / "model").exists()
    assert not (run / "work").exists()
    assert not (run / "report.json").exists()
    error = refusal(own(), resume=True)
    assert isinstance(error, RunError)
    assert "calibrate.engine custom" in str(error)
    assert "--overwrite" in str(error)
    assert calibrated(own(), overwrite=True).accepted


UNSAVABLE = {
    "says so": (
        "def is_serializable(self) -> bool:\n        return True",
        "def is_serializable(self) -> bool:\n        return False",
        RecipeError,
        r"recipe.yaml:\d+: quant.plugin: .*int8_symmetric cannot be saved",
    ),
    "fails": (
        "    @property\n    def is_trainable",
        "    def get_state_dict_and_metadata(self, model):\n        raise RuntimeError('no disk')\n\n"
        "    @property\n    def is_trainable",
        ModelError,
        "mine.py: the model that it quantized cannot be saved: RuntimeError: no disk",
    ),
}


@pytest.mark.parametrize("case", UNSAVABLE)
def test_what_cannot_be_saved_is_refused(case: str, own: Recipe, plugin: Path, tmp_path: Path) -> None:
    old, new, kind, text = UNSAVABLE[case]
    changed(plugin, old, new)
    error = refusal(own())
    assert isinstance(error, kind)
    assert re.search(text, str(error)), str(error)
    assert not (tmp_path / "run" / "model").exists()
    assert (tmp_path / "run").exists() == (case == "fails")


def test_a_changed_plugin_does_not_load_the_result(own: Recipe, plugin: Path, tmp_path: Path) -> None:
    path = own()
    report = calibrated(path)
    changed(plugin, "LEVELS = 127", "LEVELS = 100")
    with pytest.raises(ModelError, match=r"quant\.plugin .* has changed since this was quantized"):
        result_perplexity(path, report, tmp_path / "run")


PLUGIN = "the code of quant.plugin"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no plugin": (
        {"quant": {"mode": "none", "plugin": ...}},
        f"calibrate.engine: custom quantizes by {PLUGIN}, and quant.mode is none: set quant.mode to custom",
    ),
    "bits": ({"calibrate": {"bits": 8}}, f"calibrate.bits: {PLUGIN} decides it"),
    "a preset": ({"calibrate": {"preset": "w8a16"}}, f"calibrate.data_type: {PLUGIN} decides it"),
    "windows": ({"calibrate": {"samples": 4}}, f"calibrate.samples: {PLUGIN} is given no calibration windows"),
    "layers": ({"calibrate": {"skip_modules": ["q_proj"]}}, f"skip_modules: {PLUGIN} is given quant.skip_modules"),
    "tuning": ({"calibrate": {"iters": 4}}, "calibrate.iters: is read only with calibrate.engine autoround"),
    "the remedy": (
        {"calibrate": {"accept": {"kl": 1.0}, "remedy": "auto"}},
        "calibrate.remedy: holds single layers in more bits, and custom quantizes the whole model at once",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(case: str, own: Recipe, tmp_path: Path) -> None:
    sections, text = REFUSED[case]
    error = refusal(own(**sections))
    assert isinstance(error, RecipeError)
    assert text in str(error)
    assert "recipe.yaml:" in str(error)
    assert not (tmp_path / "run").exists()


@pytest.mark.real
def test_the_package_model_from_its_gguf_file(own: Recipe, tmp_path: Path) -> None:
    float32 = {"path": PACKAGE_MODEL, "dtype": "float32"}
    path = own(model=float32, calibrate={"verify_samples": 2, "accept": {"kl": 0.01}})
    report = calibrated(path)
    assert report.quantized_layers == 210
    assert result_perplexity(path, report, tmp_path / "run") == pytest.approx(
        report.attempts[0].perplexity.value, rel=1e-3
    )
