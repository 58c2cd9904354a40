"""`qft calibrate`: results that load elsewhere, are accepted or refused, and can be resumed to the bit."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from qft.commands.calibrate import calibrate
from qft.commands.evaluate import EvalOptions, evaluate
from qft.documents.calibration import CalibrationReport
from qft.errors import GateError, Interrupted, QftError
from qft.plan import plan_calibration
from qft.progress import View
from qft.recipe import load
from tests.support.calibrations import calibrated, held_out, perplexity, refusal, weights
from tests.support.cli import qft
from tests.support.known import known
from tests.support.models import byte_tokenizer, tiny_llama
from tests.support.rows import chat, write_jsonl
from tests.support.runs import trained
from tests.support.tiny import write_tiny_model

HELD_OUT = {"eval_fraction": 0.2}
Recipe = Callable[..., Path]


class Cut(View):
    """Kills the calibration once a block is finished."""

    def __init__(self, after: int) -> None:
        self.after = after

    def note(self, text: str) -> None:
        if text.startswith(f"block {self.after} "):
            raise KeyboardInterrupt


SCHEMES: dict[str, dict[str, Any]] = {
    "w4a16": {"group_size": 32},
    "w4a16 with zero points": {"group_size": 32, "symmetric": False},
    "w8a16": {"bits": 8},
    "w8a8 dynamic": {"preset": "w8a8-dynamic"},
    "w8a8 static": {"preset": "w8a8-static"},
    "autoround": {"engine": "autoround", "group_size": 32},
    "autoround, tuned": {"engine": "autoround", "group_size": 32, "iters": 4},
    "nf4": {"engine": "bitsandbytes", "data_type": "nf4"},
    "fp4": {"engine": "bitsandbytes", "data_type": "fp4"},
    "int8": {"engine": "bitsandbytes", "bits": 8, "activations": "dynamic"},
    "torchao int8": {"engine": "torchao", "bits": 8},
    "torchao int8 dynamic": {"engine": "torchao", "bits": 8, "activations": "dynamic"},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_result_is_what_was_measured_once_it_is_loaded_again(scheme: str, recipe: Recipe, tmp_path: Path) -> None:
    path = recipe(calibrate=SCHEMES[scheme])
    report = calibrated(path)
    assert report.result == str(tmp_path / "run" / "model")
    assert report.bytes_after < report.bytes_before
    [attempt] = report.attempts
    assert perplexity(report, path) == pytest.approx(attempt.perplexity.value, rel=1e-3)
    assert attempt.perplexity.value != report.perplexity_before.value
    assert attempt.kl_interval.low <= attempt.kl_interval.value <= attempt.kl_interval.high
    assert attempt.kl_interval.value == pytest.approx(attempt.kl_mean)
    assert len(report.layers) == report.quantized_layers == 14
    assert report.skipped_layers == ["lm_head"]
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report.model_dump(mode="json")
    assert not (tmp_path / "run" / "work").exists()


def test_the_original_is_left_alone_and_its_hash_recorded(recipe: Recipe, tiny_model: Path, tmp_path: Path) -> None:
    before = weights(tiny_model)
    calibrated(recipe())
    assert weights(tiny_model) == before
    record = json.loads((tmp_path / "run" / "model" / "calibration.json").read_text())
    assert record["base"]["sha256"]["model.safetensors"] == before["model.safetensors"]
    assert (tmp_path / "run" / "calibration.jsonl").exists()


def test_tuning_changes_the_rounding(recipe: Recipe, tmp_path: Path) -> None:
    for iters in (0, 3):
        own = {"engine": "autoround", "group_size": 32, "iters": iters}
        calibrated(recipe(output_dir=str(tmp_path / f"{iters}"), calibrate=own))
    searched, tuned = (weights(tmp_path / f"{iters}" / "model") for iters in (0, 3))
    assert searched.keys() == tuned.keys()
    assert searched["model-block-00000.safetensors"] != tuned["model-block-00000.safetensors"]


@pytest.mark.parametrize("engine", ["rtn", "autoround"])
def test_an_interrupted_calibration_resumes_to_the_same_bits(engine: str, recipe: Recipe, tmp_path: Path) -> None:
    own = {"engine": engine, "bits": 4, "group_size": 32}
    if engine == "autoround":
        own["iters"] = 3
    path = recipe(calibrate=own)
    whole = calibrated(path)
    expected = weights(tmp_path / "run" / "model")
    cut = recipe(output_dir=str(tmp_path / "cut"), calibrate=own)
    with pytest.raises(KeyboardInterrupt):
        calibrate(load(cut), Cut(after=1))
    assert not (tmp_path / "cut" / "model").exists()
    assert not (tmp_path / "cut" / "report.json").exists()
    report = calibrated(cut, resume=True)
    assert weights(tmp_path / "cut" / "model") == expected
    assert len(report.block_seconds) == 1
    assert report.attempts == whole.attempts
    assert report.layers == whole.layers


def _flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("block-00000-0.safetensors", _flipped),
        ("block-00000-0.json", Path.unlink),
        ("errors-00000.json", lambda path: path.write_text("{}{")),
        ("streams-00001.safetensors", lambda path: os.truncate(path, 50)),
        ("done-00000.json", lambda path: path.write_text("")),
    ],
)
def test_a_finished_block_that_was_damaged_is_not_taken(
    name: str, harm: Callable[[Path], object], recipe: Recipe, tmp_path: Path
) -> None:
    class Told(View):
        def __init__(self) -> None:
            self.notes = list[str]()

        def note(self, text: str) -> None:
            self.notes.append(text)

    path = recipe(calibrate={"engine": "rtn", "bits": 8})
    with pytest.raises(KeyboardInterrupt):
        calibrate(load(path), Cut(after=1))
    harm(tmp_path / "run" / "work" / name)
    notes = tmp_path / "run" / "work" / "notes.md"
    notes.write_text("mine")
    view = Told()
    report = calibrate(load(path), view, resume=True)
    assert len(report.block_seconds) == 2
    [told] = [note for note in view.notes if "quantized again" in note]
    assert f"not what was written: {name}; all blocks" in told
    resumed = weights(tmp_path / "run" / "model")
    assert [*notes.parent.iterdir()] == [notes]
    calibrate(load(path), View(), overwrite=True)
    assert (tmp_path / "run" / "replaced-1" / "work" / "notes.md").read_text() == "mine"
    assert weights(tmp_path / "run" / "model") == resumed


@pytest.mark.parametrize(("moment", "code"), [("Reading", 143), ("block 1 ", 75)])
def test_a_signal_keeps_the_finished_blocks(moment: str, code: int, recipe: Recipe, tmp_path: Path) -> None:
    class Sender(View):
        def note(self, text: str) -> None:
            if text.startswith(moment):
                os.kill(os.getpid(), signal.SIGTERM)

    path = recipe(calibrate={"engine": "rtn", "bits": 8})
    with pytest.raises(Interrupted) as caught:
        calibrate(load(path), Sender())
    assert caught.value.exit_code == code
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "interrupted"
    if code == 75:
        assert "--resume goes on behind the last finished block" in str(caught.value)
        assert len(calibrated(path, resume=True).block_seconds) == 1


def test_a_miss_is_refused_with_its_figures_and_leaves_no_model(recipe: Recipe, tmp_path: Path) -> None:
    path = recipe(calibrate={"group_size": 32, "accept": {"perplexity_increase": "200%", "kl": 1e-9}})
    error = refusal(path)
    assert isinstance(error, GateError)
    assert error.exit_code == 4
    assert "kl is" in str(error)
    assert "perplexity_increase is" not in str(error)
    assert not (tmp_path / "run" / "model").exists()
    report = CalibrationReport(**json.loads((tmp_path / "run" / "report.json").read_text()))
    assert not report.accepted
    assert [(check.name, check.passed) for check in report.checks] == [("perplexity_increase", True), ("kl", False)]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "refused"
    # What is asked of the blocks may change; they need not be quantized again.
    kinder = recipe(calibrate={"group_size": 32, "accept": {"kl": 10.0}})
    again = calibrated(kinder, resume=True)
    assert again.accepted
    assert again.block_seconds == []
    assert again.attempts == report.attempts


def test_a_drop_of_a_score_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    """A random model repeats itself in the same way after rounding to 8 bits, so nothing drops."""
    metrics = ["exact_match", "regex"]
    scores = {"metrics": metrics, "regex": ".", "max_new_tokens": 4, "batch_size": 4, "samples": 4}
    path = recipe(calibrate={"preset": "w8a16", "accept": {"score_drop": "1%"}}, eval=scores, data=HELD_OUT)
    report = calibrated(path)
    assert [check.name for check in report.checks] == ["score_drop"]
    assert report.scores_before.keys() == report.attempts[0].scores.keys() == {"exact_match", "regex"}
    assert report.checks[0].value == max(report.scores_before[n] - report.attempts[0].scores[n] for n in metrics)


def test_the_remedy_keeps_the_worst_layers_until_it_is_accepted(recipe: Recipe, tmp_path: Path) -> None:
    first = calibrated(recipe(calibrate={"group_size": 32})).attempts[0]
    accept = {"kl": first.kl_mean / 4}
    own = {"group_size": 32, "accept": accept, "remedy": "auto"}
    report = calibrated(recipe(output_dir=str(tmp_path / "better"), calibrate=own))
    assert report.attempts[0] == first
    assert len(report.attempts) > 1
    sizes = [attempt.weight_bytes for attempt in report.attempts]
    assert sizes == sorted(sizes)
    assert report.attempts[-1].kl_mean <= accept["kl"] < report.attempts[-2].kl_mean
    kept = report.attempts[1].kept
    worst = min(report.layers, key=lambda layer: layer.output_snr_db).name
    assert worst in kept
    assert {bits for attempt in report.attempts for bits in attempt.kept.values()} <= {8, 16}
    document = evaluate(
        [report.result or ""], EvalOptions(data=str(held_out(report, tmp_path / "recipe.yaml"))), View()
    )
    assert document.targets[0].perplexity == pytest.approx(report.attempts[-1].perplexity.value, rel=1e-3)


def test_the_remedy_stays_within_its_bytes(recipe: Recipe, tmp_path: Path) -> None:
    first = calibrated(recipe(calibrate={"group_size": 32})).attempts[0]
    limit = first.weight_bytes + 8000
    own = {"group_size": 32, "accept": {"kl": 1e-9}, "remedy": "auto", "max_bytes": limit}
    path = recipe(output_dir=str(tmp_path / "small"), calibrate=own)
    error = refusal(path)
    report = CalibrationReport(**json.loads((tmp_path / "small" / "report.json").read_text()))
    assert "attempts" in str(error)
    assert len(report.attempts) > 1
    headers = 2000  # the safetensors headers of raised layers have other lengths
    assert all(attempt.weight_bytes <= limit + headers for attempt in report.attempts)


def test_a_run_is_merged_before_it_is_quantized(
    recipe: Recipe, recipe_file: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qft.commands.train import train

    def whole_model(*_: object) -> None:
        raise AssertionError("the whole model was loaded")

    run, hard = tmp_path / "trained", {"report_to": [], "learning_rate": 0.05}
    train(load(recipe_file("train.yaml", train=hard, output_dir=str(run))), View())
    path = recipe(model={"path": str(run), "dtype": "float32"}, calibrate={"preset": "w8a16"})
    with monkeypatch.context() as patched:
        patched.setattr("qft.calibration.source.load_base", whole_model)
        report = calibrated(path)
    data = held_out(report, path)
    document = evaluate([f"{run}@merged", f"{run}@base"], EvalOptions(data=data), View())
    merged, base = (known(target.perplexity) for target in document.targets)
    assert report.perplexity_before.value == pytest.approx(merged, rel=0.02)
    assert abs(merged - base) / base > 0.05


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
def test_a_head_that_a_run_trained_is_no_longer_tied(recipe: Recipe, tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    byte_tokenizer().save_pretrained(tmp_path / "tied")
    (tmp_path / "trained").mkdir()
    scores = {"metrics": ["exact_match"], "max_new_tokens": 4}
    sections = {"adapter": {"r": 4, "modules_to_save": ["lm_head"]}, "eval": scores}
    run = trained(tmp_path / "trained", tmp_path / "tied", quant=None, train={"max_steps": 4}, **sections)
    accept = {"preset": "w8a16", "accept": {"score_drop": 1.0}}
    model = {"path": str(run), "dtype": "float32"}
    path = recipe(model=model, calibrate=accept, eval=scores, data=HELD_OUT)
    report = calibrated(path)
    asked = EvalOptions(data=held_out(report, path), metrics=("exact_match",))
    [merged] = evaluate([f"{run}@merged"], asked, View()).targets
    assert report.perplexity_before.value == pytest.approx(merged.perplexity, rel=0.02)
    assert perplexity(report, path) == pytest.approx(report.attempts[0].perplexity.value, rel=1e-3)
    assert report.scores_before == {name: score.value for name, score in merged.scores.items()}


def test_layers_that_the_recipe_skips_stay_as_they_are(recipe: Recipe, tiny_model: Path, tmp_path: Path) -> None:
    own = {"skip_modules": ["down_proj", "layers.0.mlp.up_proj"]}
    report = calibrated(recipe(model={"dtype": "float32"}, calibrate=own))
    assert report.quantized_layers == 11
    name = "model.layers.1.mlp.down_proj.weight"
    shards = json.loads((tmp_path / "run" / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    with (
        safe_open(tmp_path / "run" / "model" / shards[name], "pt") as kept,
        safe_open(tiny_model / "model.safetensors", "pt") as original,
    ):
        torch.testing.assert_close(kept.get_tensor(name), original.get_tensor(name), rtol=0, atol=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").chat_template == byte_tokenizer().chat_template
    assert hasattr(model.model.layers[1].mlp.down_proj, "weight")


def test_json_is_the_document_and_nothing_else(recipe: Recipe, tmp_path: Path) -> None:
    ran = qft("calibrate", str(recipe()), "--out", str(tmp_path / "elsewhere"), "--json")
    assert ran.exit_code == 0, ran.stderr
    document = json.loads(ran.stdout)
    schema = json.loads(qft("schema", "calibration").stdout)
    Draft202012Validator(schema).validate(document)
    assert document["result"] == str(tmp_path / "elsewhere" / "model")
    assert "Traceback" not in ran.stderr


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
REFUSED: dict[str, tuple[dict[str, Any], str, int]] = {
    "group size": ({"calibrate": {"group_size": 128}}, "calibrate.group_size: model.layers.0", 2),
    "float8 on a CPU": ({"calibrate": {"preset": "fp8"}}, "does not compute in float8", 2),
    "unknown layer": ({"calibrate": {"skip_modules": ["dwon_proj"]}}, "dwon_proj is no linear layer", 2),
    "nothing left": ({"calibrate": {"skip_modules": LINEARS}}, "nothing to quantize", 2),
    "tiny set": ({"calibrate": {"preset": "w8a8-static", "data": "tiny.jsonl"}}, "tokens", 5),
    "empty set": ({"calibrate": {"preset": "w8a8-static", "data": "empty.jsonl"}}, "empty.jsonl", 5),
    "no data": ({"calibrate": {"data": "nowhere.jsonl"}}, "nowhere.jsonl", 3),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_with_one_message(case: str, recipe: Recipe, tmp_path: Path) -> None:
    sections, text, code = REFUSED[case]
    write_jsonl(tmp_path / "tiny.jsonl", [chat("a", "b"), chat("c", "d")])
    (tmp_path / "empty.jsonl").write_text("")
    error = refusal(recipe(**sections))
    assert text in str(error)
    assert error.exit_code == code
    assert not (tmp_path / "run").exists()


def test_a_quantized_model_is_not_quantized_again(recipe: Recipe, tmp_path: Path) -> None:
    calibrated(recipe())
    error = refusal(recipe(model={"path": str(tmp_path / "run" / "model")}, output_dir=str(tmp_path / "twice")))
    assert "already quantized" in str(error)
    assert "model.path" in str(error)


def test_a_full_disk_is_told_before_anything_is_written(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = os.statvfs(tmp_path)
    usage = type("usage", (), {"total": full.f_blocks, "used": full.f_blocks, "free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    error = refusal(recipe())
    assert error.exit_code == 7
    assert "the disk has 1000 bytes free" in str(error)
    assert not (tmp_path / "run").exists()


def test_a_recipe_without_the_section_says_what_to_add(recipe_file: Recipe) -> None:
    error = refusal(recipe_file())
    assert "calibrate: {preset: w4a16}" in str(error)


def test_other_block_stacks_are_streamed_alike(tmp_path: Path, recipe: Recipe) -> None:
    """A model with sliding windows hands its blocks different masks."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=256,
        pad_token_id=2,
        eos_token_id=2,
        bos_token_id=0,
    )
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    byte_tokenizer().save_pretrained(tmp_path / "gemma")
    path = recipe(model={"path": str(tmp_path / "gemma"), "dtype": "float32"}, calibrate={"preset": "w8a16"})
    report = calibrated(path)
    targets, data = [f"{tmp_path / 'gemma'}@float32", report.result or ""], held_out(report, path)
    document = evaluate(targets, EvalOptions(data=data), View())
    plain, quantized = (known(target.perplexity) for target in document.targets)
    assert report.perplexity_before.value == pytest.approx(plain, rel=1e-5)
    assert report.attempts[0].perplexity.value == pytest.approx(quantized, rel=5e-4)


# Blocks that return a tuple of two; buffers that only the model around a block computes; names that only files have; a
# head that is registered before the embeddings that it is tied to.
@pytest.mark.parametrize("kind", ["bamba", "falcon_h1", "laguna", "xlm-roberta"])
def test_what_is_peculiar_to_a_type_is_streamed_and_read_again(kind: str, tmp_path: Path, recipe: Recipe) -> None:
    model = {"path": str(write_tiny_model(tmp_path / kind, kind)), "dtype": "float32"}
    settings = {"preset": "w8a8-dynamic", "engine": "rtn", "allow_partial": True, "verify_samples": 2}
    path = recipe(model=model, calibrate=settings)
    report = calibrated(path)
    assert perplexity(report, path) == pytest.approx(report.attempts[-1].perplexity.value, rel=1e-3)


def test_what_transformers_could_not_load_again_is_left_or_refused(tmp_path: Path, recipe: Recipe) -> None:
    """Some models' own code sets weights where they are loaded, which layers of packed integers have not."""
    paths = {kind: str(write_tiny_model(tmp_path / kind, kind)) for kind in ("nanochat", "modernbert-decoder")}
    packed = {"preset": "w4a16", "engine": "rtn", "group_size": 32, "allow_partial": True}
    with pytest.raises(QftError, match=r"calibrate\.preset to w8a8-dynamic"):
        plan_calibration(load(recipe(model={"path": paths["modernbert-decoder"]}, calibrate=packed)))
    report = calibrated(recipe(model={"path": paths["nanochat"]}, calibrate=packed))
    model = AutoModelForCausalLM.from_pretrained(report.result)
    assert model.model.layers[0].self_attn.o_proj.weight.dtype == torch.bfloat16
    assert hasattr(model.model.layers[0].self_attn.q_proj, "weight_scale")


def test_an_unquantized_tiny_llama_of_one_block(tmp_path: Path, recipe: Recipe) -> None:
    tiny_llama(num_hidden_layers=1, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    byte_tokenizer().save_pretrained(tmp_path / "tied")
    report = calibrated(recipe(model={"path": str(tmp_path / "tied")}, calibrate={"group_size": 32}))
    assert report.quantized_layers == 7
    model = AutoModelForCausalLM.from_pretrained(report.result)
    assert model.lm_head.weight is model.model.embed_tokens.weight
