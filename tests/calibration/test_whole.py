"""`qft calibrate` by engines that quantize the whole model at once: a quantizer from outside the package."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from qft.commands.calibrate import calibrate
from qft.commands.evaluate import EvalOptions, evaluate
from qft.commands.train import train
from qft.documents.calibration import CalibrationReport
from qft.errors import GateError, ModelError, RecipeError, RunError
from qft.gguf.file import write_gguf
from qft.progress import View
from qft.recipe import load
from tests.support.calibrations import calibrated, held_out, perplexity, refusal, weights
from tests.support.cli import qft
from tests.support.gguf import saved
from tests.support.known import known
from tests.support.models import byte_tokenizer, tiny_llama
from tests.support.plugins import changed, custom

Recipe = Callable[..., Path]
LLMCOMPRESSOR = os.environ.get("QFT_LLMCOMPRESSOR_PYTHON", "")
needs_llmcompressor = pytest.mark.skipif(
    not LLMCOMPRESSOR, reason="needs QFT_LLMCOMPRESSOR_PYTHON, the Python of an environment that has llmcompressor"
)
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
    return known(evaluate([str(run)], EvalOptions(data=held_out(report, path)), View()).targets[0].perplexity)


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
        known(t.perplexity) for t in evaluate([f"{run}@merged", f"{run}@base"], EvalOptions(data=data), View()).targets
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


def by_llmcompressor(**calibrate: Any) -> dict[str, Any]:
    return {"engine": "llmcompressor", "engine_python": LLMCOMPRESSOR, "samples": 8, **calibrate}


MADE: dict[str, dict[str, Any]] = {
    "gptq": {"group_size": 32},
    "gptq with zero points": {"group_size": 32, "symmetric": False},
    "gptq, 8 bits": {"bits": 8},
    "awq": {"algorithm": "awq", "group_size": 32},
    "awq with zero points": {"algorithm": "awq", "group_size": 32, "symmetric": False},
    "smoothquant": {"algorithm": "smoothquant", "bits": 8, "activations": "dynamic"},
    "smoothquant, static": {"algorithm": "smoothquant", "bits": 8, "activations": "static"},
}


@needs_llmcompressor
@pytest.mark.parametrize("case", MADE)
def test_llmcompressor_makes_what_is_measured_once_it_is_loaded_again(
    case: str, recipe: Recipe, tiny_model: Path, tmp_path: Path
) -> None:
    before, asked = weights(tiny_model), by_llmcompressor(**MADE[case], skip_modules=["layers.1.mlp.up_proj"])
    path = recipe(calibrate=asked | {"accept": {"kl": 0.1}})
    report = calibrated(path)
    [attempt] = report.attempts
    assert report.accepted
    assert perplexity(report, path) == pytest.approx(attempt.perplexity.value, rel=1e-3)
    assert attempt.perplexity.value != report.perplexity_before.value
    assert 0 < attempt.kl_mean < 0.1
    assert weights(tiny_model) == before
    assert report.bytes_after < report.bytes_before
    assert report.quantized_layers == 13
    assert report.skipped_layers == ["model.layers.1.mlp.up_proj", "lm_head"]
    assert report.scheme["algorithm"] == MADE[case].get("algorithm", "gptq")
    assert report.versions["llmcompressor"]
    assert report.calibration is not None
    assert report.calibration["windows"] == 8
    assert report.peak_host_bytes > report.peak_bytes > 0
    run = tmp_path / "run"
    saved = load_file(run / "model" / "model.safetensors")
    norms: Any = torch.cat([tensor.float() for name, tensor in saved.items() if name.endswith("_layernorm.weight")])
    if report.scheme["algorithm"] == "gptq":
        assert len(report.layers) == 13
        assert all(layer.output_snr_db > 10 for layer in report.layers)
        assert (norms == 1).all()
    else:
        assert report.layers == []
        assert norms.unique().numel() > 8  # where it scales the layers' inputs
    assert not (run / "work").exists()
    record = json.loads((run / "model" / "calibration.json").read_text())
    assert record["versions"]["llmcompressor"] == report.versions["llmcompressor"]


@needs_llmcompressor
def test_gptq_makes_less_noise_than_rounding(recipe: Recipe, tmp_path: Path) -> None:
    """Of the layers' outputs, which is what it minimises."""
    gptq = calibrated(recipe(model={"dtype": "float32"}, calibrate=by_llmcompressor(group_size=32, samples=32)))
    rtn = calibrated(
        recipe("rtn.yaml", model={"dtype": "float32"}, output_dir=str(tmp_path / "rtn"), calibrate={"group_size": 32})
    )
    gained = [one.output_snr_db - other.output_snr_db for one, other in zip(gptq.layers, rtn.layers, strict=True)]
    assert sum(gained) / len(gained) > 0.5


@needs_llmcompressor
def test_llmcompressor_quantizes_a_merged_run(recipe: Recipe, recipe_file: Recipe, tmp_path: Path) -> None:
    run, hard = tmp_path / "trained", {"report_to": [], "learning_rate": 0.05}
    train(load(recipe_file("train.yaml", train=hard, output_dir=str(run))), View())
    path = recipe(model={"path": str(run), "dtype": "float32"}, calibrate=by_llmcompressor(bits=8))
    report = calibrated(path)
    data = held_out(report, path)
    targets = [f"{run}@merged", f"{run}@base", report.result or ""]
    merged, base, quantized = (known(t.perplexity) for t in evaluate(targets, EvalOptions(data=data), View()).targets)
    assert abs(merged - base) / base > 0.05
    assert report.perplexity_before.value == pytest.approx(merged, rel=0.02)
    assert quantized == pytest.approx(merged, rel=0.05)


@needs_llmcompressor
def test_a_failure_of_llmcompressor_is_told_in_one_line(recipe: Recipe, tmp_path: Path) -> None:
    """It knows no norm in front of the layers of this model, which AWQ would scale."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=264, bos_token_id=0, eos_token_id=2, **sizes)).save_pretrained(
        tmp_path / "neox"
    )
    byte_tokenizer().save_pretrained(tmp_path / "neox")
    asked = by_llmcompressor(algorithm="awq", group_size=32)
    error = refusal(recipe(model={"path": str(tmp_path / "neox")}, calibrate=asked))
    assert isinstance(error, ModelError)
    assert len(str(error).splitlines()) == 1
    assert str(error).startswith("calibrate.engine: llmcompressor failed (1): ")
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "work").exists()
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"


@needs_llmcompressor
def test_its_progress_is_told_and_an_interrupt_ends_its_process(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as qft.machine.environment has it for qft's own process
    monkeypatch.setenv("TQDM_DELAY", "5")
    told: list[str] = []

    class Watch(View):
        def note(self, text: str) -> None:
            told.append(text)
            if text.startswith("llm-compressor: part 2"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(load(recipe(calibrate=by_llmcompressor(group_size=32))), Watch())
    assert told[-2:] == ["llm-compressor: part 1 of 3", "llm-compressor: part 2 of 3"]
    assert not psutil.Process().children()
    assert not (tmp_path / "run" / "work").exists()
    assert not (tmp_path / "run" / "model").exists()


NO_LLMCOMPRESSOR: dict[str, tuple[dict[str, Any], str]] = {
    "no Python": ({"engine_python": ...}, "calibrate.engine_python: llmcompressor runs in an environment of its own"),
    "not there": ({"engine_python": "env/bin/python"}, "/env/bin/python does not exist"),
    "no program": ({"engine_python": "rows.jsonl"}, "rows.jsonl cannot be run: [Errno 13]"),
    "not installed": (
        {"engine_python": sys.executable},
        f"cannot import llmcompressor (ModuleNotFoundError: No module named 'llmcompressor'); "
        f"install it there: {sys.executable} -m pip install 'llmcompressor>=",
    ),
    "AWQ of 8 bits": (
        {"engine_python": sys.executable, "algorithm": "awq", "bits": 8},
        "calibrate.algorithm: awq makes int with 4 bits and activations none",
    ),
    "SmoothQuant of 4": (
        {"engine_python": sys.executable, "algorithm": "smoothquant"},
        "calibrate.algorithm: smoothquant makes int with 8 bits and activations dynamic; int with 8 bits and activ",
    ),
    "GPTQ of nf4": ({"engine_python": sys.executable, "data_type": "nf4"}, "calibrate.algorithm: gptq makes int"),
    "the remedy": (
        {"engine_python": sys.executable, "accept": {"kl": 1.0}, "remedy": "auto"},
        "calibrate.remedy: holds single layers in more bits, and llmcompressor quantizes the whole model at once",
    ),
    "another engine": ({"engine": "rtn", "engine_python": sys.executable}, "only with calibrate.engine llmcompressor"),
    "another's algorithm": (
        {"engine": "rtn", "engine_python": ..., "algorithm": "awq"},
        "calibrate.algorithm: is read",
    ),
}


@pytest.mark.parametrize("case", NO_LLMCOMPRESSOR)
def test_llmcompressor_is_refused_before_anything_is_loaded(case: str, recipe: Recipe, tmp_path: Path) -> None:
    asked, text = NO_LLMCOMPRESSOR[case]
    own = {"engine": "llmcompressor", **asked}
    error = refusal(recipe(calibrate={name: value for name, value in own.items() if value is not ...}))
    assert isinstance(error, RecipeError)
    assert text in str(error)
    assert "recipe.yaml:" in str(error)
    assert not (tmp_path / "run").exists()


def test_qft_check_asks_the_python_for_llmcompressor(recipe: Recipe) -> None:
    asked = {"engine": "llmcompressor", "engine_python": sys.executable}
    refused = qft("check", str(recipe(calibrate=asked)))
    assert refused.exit_code == 2
    assert "calibrate.engine_python:" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@needs_llmcompressor
def test_qft_check_tells_the_algorithm(recipe: Recipe) -> None:
    told = qft("check", str(recipe(calibrate=by_llmcompressor(algorithm="awq", group_size=32))))
    assert told.exit_code == 0, told.stderr
    assert "by awq of llmcompressor" in " ".join(told.stdout.split())


def test_the_python_of_a_virtual_environment_is_not_resolved(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "python").symlink_to(sys.executable)
    loaded = load(recipe(calibrate={"engine": "llmcompressor", "engine_python": "env/python"}))
    assert loaded.recipe.calibrate is not None
    assert loaded.recipe.calibrate.engine_python == str(tmp_path / "env" / "python")


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


def test_a_model_in_a_gguf_file(own: Recipe, tmp_path: Path) -> None:
    write_gguf(saved(tiny_llama(), tmp_path / "model", byte_tokenizer()), tmp_path / "model.gguf", kind="f16")
    path = own(model={"path": str(tmp_path / "model.gguf"), "dtype": "float32"}, calibrate={"accept": {"kl": 0.01}})
    report = calibrated(path)
    assert report.quantized_layers == 14
    assert result_perplexity(path, report, tmp_path / "run") == pytest.approx(
        report.attempts[0].perplexity.value, rel=1e-3
    )
