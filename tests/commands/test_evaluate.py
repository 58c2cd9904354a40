"""`qft eval`: what is measured, against independent computations, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from transformers import AutoModelForCausalLM, AutoTokenizer

from qft.commands.evaluate import EvalOptions, evaluate
from qft.commands.results import default_out
from qft.commands.train import train
from qft.data.prepare import prepare
from qft.documents.evaluation import EvalDocument
from qft.errors import MissingError, QftError
from qft.measure.likelihood import LogProbs, Passage, measure, windows
from qft.progress import View
from qft.recipe import load
from tests.support.cli import qft
from tests.support.known import known
from tests.support.models import byte_tokenizer, plain_loss, tiny_llama
from tests.support.rows import chat, write_jsonl
from tests.support.runs import HARD

RecipeFile = Callable[..., Path]
TEXT = "The quick brown fox jumps over the lazy dog. " * 12 + "Ünïcödé ends it."


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A finished nf4 run of the tiny model with held-out rows."""
    folder = tmp_path_factory.mktemp("evaluated")
    write_jsonl(folder / "train.jsonl", [chat(f"say {i}", f"it is {i}") for i in range(16)])
    write_jsonl(folder / "held.jsonl", [chat(f"say {i}", f"it is {i}") for i in range(20, 26)])
    (folder / "recipe.yaml").write_text(
        json.dumps(
            {
                "model": {"path": str(tiny_model), "device": "cpu"},
                "quant": {"preset": "finetune"},
                "data": {"train": "train.jsonl", "eval": "held.jsonl", "max_length": 128},
                "train": HARD | {"report_to": []},
                "eval": {"metrics": ["exact_match", "rouge_l"], "max_new_tokens": 8, "batch_size": 4},
                "output_dir": "run",
            }
        )
    )
    train(load(folder / "recipe.yaml"), View())
    return folder / "run"


def measured(*targets: Any, **options: Any) -> EvalDocument:
    return evaluate([str(target) for target in targets], EvalOptions(**options), View())


def refusal(*targets: Any, **options: Any) -> QftError:
    with pytest.raises(QftError) as caught:
        measured(*targets, **options)
    return caught.value


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (5, 1), (100, 50)])
@pytest.mark.parametrize("length", [2, 8, 9, 41])
def test_windows_score_every_token_once_with_the_context_promised(length: int, window: int, stride: int) -> None:
    ids = list(range(length))
    made = windows(ids, window, stride)
    scored = [label for passage in made for label in passage.labels if label >= 0]
    assert scored == ids
    assert all(len(passage.input_ids) <= window for passage in made)
    for passage in made[1:]:
        first = next(i for i, label in enumerate(passage.labels) if label >= 0)
        assert first >= min(window - stride, 1)


def test_perplexity_of_chats_is_that_of_the_plain_loss(run_folder: Path, tiny_model: Path) -> None:
    document = measured(f"{run_folder}@float32")
    [result] = document.targets
    from qft.plan import make_plan

    plan = make_plan(load(run_folder / "recipe.yaml"))
    assert plan.data.eval is not None
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert result.perplexity == pytest.approx(math.exp(plain_loss(model, plan.data.eval)), rel=1e-5)
    assert result.eval_tokens == sum(plan.data.eval["supervised"])
    interval = known(result.perplexity_interval)
    assert interval.low < known(result.perplexity) < interval.high
    assert interval.value == result.perplexity


def test_perplexity_and_bits_per_byte_of_a_text_in_one_window(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    document = measured(f"{tiny_model}@float32", data=str(tmp_path / "text.txt"), window=1000, stride=1000)
    [result] = document.targets
    ids = AutoTokenizer.from_pretrained(tiny_model)(TEXT, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    # One token a byte, and the first token is not scored.
    assert result.eval_tokens == len(TEXT.encode()) - 1
    assert result.bits_per_byte == pytest.approx(loss / math.log(2), rel=1e-5)


def test_divergence_is_that_of_the_definition(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:200])
    reference, other = f"{tiny_model}@float32", f"{tiny_model}@nf4"
    document = measured(
        other, reference=reference, data=str(tmp_path / "text.txt"), window=1000, stride=1000, kl_tokens=50
    )
    assert [target.name for target in document.targets] == [reference, other]
    own, result = document.targets
    assert (own.kl_mean, own.top1_agreement, own.perplexity_change) == (0, 1, None)

    from transformers import BitsAndBytesConfig

    ids = AutoTokenizer.from_pretrained(tiny_model)(TEXT[:200], return_tensors="pt").input_ids
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    settings = {"quantization_config": four_bit, "dtype": torch.bfloat16, "device_map": "cpu"}
    with torch.no_grad():
        p = AutoModelForCausalLM.from_pretrained(tiny_model)(ids).logits[0, :50].double().softmax(-1)
        q = AutoModelForCausalLM.from_pretrained(tiny_model, **settings)(ids).logits[0, :50].double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1).numpy()
    assert result.kl_tokens == 50
    assert result.kl_mean == pytest.approx(kl.mean(), rel=0.02)
    assert result.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=0.05)
    assert result.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()), abs=0.02)
    assert result.perplexity_change is not None
    assert result.perplexity_change.value == pytest.approx(known(result.perplexity) / known(own.perplexity) - 1)


def test_batches_change_no_likelihood(tiny_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    draw = np.random.default_rng(0)
    passages = []
    for n in (3, 17, 40, 8, 29):
        ids = draw.integers(3, 200, n).tolist()
        passages.append(Passage(ids, [-100 if i % 3 == 1 else token for i, token in enumerate(ids)]))
    found = []
    for batch_size in (1, 5):
        store = LogProbs(tmp_path, 50, 264)
        measure(model, passages, batch_size=batch_size, pad=2, write=store)
        found.append(measure(model, passages, batch_size=batch_size, pad=9, against=store))
    np.testing.assert_allclose(found[0].nll, found[1].nll, rtol=1e-5)
    np.testing.assert_array_equal(found[0].tokens, [p.scored for p in passages])
    for one in found:
        assert one.divergence is not None
        assert len(one.divergence.kl) == 50
        assert one.divergence.kl.max() < 1e-5
        assert one.divergence.agrees.all()


@pytest.mark.pictures
def test_a_run_is_compared_with_its_base_in_one_command(run_folder: Path, tmp_path: Path) -> None:
    names = [f"{run_folder}@base", f"{run_folder}@nf4", f"{run_folder}@fp4", f"{run_folder}@8bit", str(run_folder)]
    names.append(f"{run_folder}@merged")
    document = measured(*names, reference=names[0], out=tmp_path / "out")
    by_name = {target.name: target for target in document.targets}
    assert list(by_name) == names
    base, nf4, fp4, int8, adapter, merged = document.targets
    assert known(adapter.perplexity) < 0.8 * known(nf4.perplexity)
    assert merged.perplexity == pytest.approx(adapter.perplexity, rel=0.05)
    assert int8.kl_mean is not None
    assert nf4.kl_mean is not None
    assert fp4.kl_mean is not None
    assert int8.kl_mean < nf4.kl_mean < fp4.kl_mean
    assert known(nf4.weight_bytes) < known(int8.weight_bytes) < known(base.weight_bytes)
    assert known(adapter.disk_bytes) > known(base.disk_bytes) > 0
    assert {target.eval_tokens for target in document.targets} == {base.eval_tokens}
    for target in document.targets:
        assert target.scores.keys() == {"exact_match", "rouge_l"}
        assert known(target.prefill_tokens_per_second) > 0
        assert known(target.decode_tokens_per_second) > 0
    assert adapter.scores["rouge_l"].value >= base.scores["rouge_l"].value
    assert adapter.score_changes["rouge_l"].value == pytest.approx(
        adapter.scores["rouge_l"].value - base.scores["rouge_l"].value
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "merged" in page
    assert "<path" in page
    written = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert written == document.model_dump(mode="json")
    assert len(list((tmp_path / "out" / "answers").glob("*.jsonl"))) == 6


def test_layers_are_compared_with_those_of_the_reference(run_folder: Path) -> None:
    reference = f"{run_folder}@float32"
    document = measured(f"{run_folder}@nf4", f"{run_folder}@8bit", reference=reference, layers=True)
    own, nf4, int8 = document.targets
    assert own.layers == []
    assert len(nf4.layers) == len(int8.layers) == 15
    worse = {layer.name: layer.output_snr_db for layer in nf4.layers if layer.kind != "lm_head"}
    better = {layer.name: layer.output_snr_db for layer in int8.layers}
    assert all(better[name] > worse[name] + 6 for name in worse)
    assert refusal(run_folder, layers=True).exit_code == 2


def test_two_evaluations_with_one_seed_are_identical(run_folder: Path) -> None:
    def quality(document: EvalDocument) -> Any:
        costs = {"prefill_tokens_per_second", "decode_tokens_per_second", "peak_bytes"}
        return [target.model_dump(exclude=costs) for target in document.targets]

    first, second = (measured(run_folder, f"{run_folder}@nf4", reference=f"{run_folder}@nf4") for _ in range(2))
    assert quality(first) == quality(second)


def test_other_rows_are_told_apart_by_source_and_scored_on_request(run_folder: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "labels.jsonl", [chat("which?", "cat"), chat("and which?", "dog")] * 3)
    document = measured(run_folder, data=str(rows), metrics=("f1_macro",))
    [result] = document.targets
    assert document.rows == 6
    assert [source.source for source in result.by_source] == [str(rows)]
    assert result.by_source[0].perplexity == result.perplexity
    assert "f1_macro" in result.scores


def test_a_text_is_scored_beside_the_answers_to_the_held_out_rows(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    document = measured(run_folder, data=str(tmp_path / "text.txt"), window=64, stride=32)
    [result] = document.targets
    assert (document.window, document.stride) == (64, 32)
    assert result.eval_tokens == len(TEXT.encode()) - 1
    assert result.scores.keys() == {"exact_match", "rouge_l"}


def test_a_run_is_evaluated_alike_once_its_data_has_moved(run_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    names = [f"{folder}@base", str(folder)]
    costs = {"prefill_tokens_per_second", "decode_tokens_per_second", "peak_bytes"}

    def found() -> Any:
        document = measured(*names, reference=names[0], out=tmp_path / "out")
        answers = {path.name: path.read_text() for path in (tmp_path / "out" / "answers").iterdir()}
        assert document.data == [str(run_folder.parent / name) for name in ("train.jsonl", "held.jsonl")]
        assert "held.jsonl:6" in "".join(answers.values())
        return [target.model_dump(exclude=costs) for target in document.targets], answers

    (folder / "rows.jsonl").rename(tmp_path / "rows.jsonl")
    encoded_again = found()
    (tmp_path / "rows.jsonl").rename(folder / "rows.jsonl")
    data = [run_folder.parent / name for name in ("train.jsonl", "held.jsonl")]
    for path in data:
        path.rename(tmp_path / path.name)
    try:
        assert found() == encoded_again
        with pytest.raises(MissingError):
            prepare(load(folder / "recipe.yaml").recipe.data, byte_tokenizer(), 0)
    finally:
        for path in data:
            (tmp_path / path.name).rename(path)


def test_what_cannot_be_evaluated_is_one_clear_message(
    run_folder: Path, tiny_model: Path, tmp_path: Path, recipe_file: RecipeFile
) -> None:
    def message(*targets: Any, code: int, **options: Any) -> str:
        error = refusal(*targets, **options)
        assert error.exit_code == code
        return str(error)

    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert "give --data" in message(tiny_model, code=2)
    assert "none of the variants" in message(f"{run_folder}@int3", code=2)
    assert "no adapter to merge" in message(f"{tiny_model}@merged", code=2, data=str(text))
    assert "holds no adapter" in message(tiny_model, code=3, data=str(text), adapter=tmp_path)
    assert "does not exist" in message("/no/such/model", code=3, data=str(text))
    assert "no such" in message(tiny_model, code=3, data=str(tmp_path / "none.txt"))
    assert "none.jsonl: no such data file" in message(tiny_model, code=3, data="none.jsonl")
    assert "no answers to score" in message(tiny_model, code=5, data=str(text), metrics=("exact_match",))
    assert "holds no rows out" in message(recipe_file(), code=5)
    assert "--stride" in message(tiny_model, code=2, data=str(text), window=10, stride=20)
    assert "is none of exact_match" in message(run_folder, code=2, metrics=("bleu",))
    assert "eval.regex" in message(run_folder, code=2, metrics=("regex",))
    (tmp_path / "empty.txt").touch()
    assert "no text to score" in message(tiny_model, code=5, data=str(tmp_path / "empty.txt"))


def test_an_adapter_of_another_base_is_refused(run_folder: Path, tmp_path: Path) -> None:
    for name, changes in (("wider", {"hidden_size": 128}), ("other", {"rope_theta": 5.0})):
        tiny_llama(**changes).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    error = refusal(tmp_path / "other", data=str(text), adapter=run_folder / "adapter")
    assert "another base" in str(error)
    # Without the run's manifest beside it, the shapes still tell.
    shutil.copytree(run_folder / "adapter", tmp_path / "moved" / "adapter")
    error = refusal(tmp_path / "wider", data=str(text), adapter=tmp_path / "moved" / "adapter")
    assert "does not fit this base" in str(error)


def test_models_with_other_tokens_are_not_compared(tiny_model: Path, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "other")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "text.txt").write_text(TEXT)
    error = refusal(tiny_model, tmp_path / "other", data=str(tmp_path / "text.txt"))
    assert "tokenizer" in str(error)
    assert error.exit_code == 6


def test_the_command_prints_tables_or_one_document(run_folder: Path, tmp_path: Path) -> None:
    shown = qft("eval", run_folder, "--out", tmp_path / "out")
    assert shown.exit_code == 0
    assert "perplexity" in shown.stdout
    assert "exact match" in shown.stdout
    result = qft("eval", run_folder, "--out", tmp_path / "out", "--json")
    document = json.loads(result.stdout)
    Draft202012Validator(json.loads(qft("schema", "eval").stdout)).validate(document)
    assert document["targets"][0]["name"] == str(run_folder)
    assert qft("eval", tmp_path / "nowhere", "--data", "x.txt").exit_code == 3


def test_results_go_into_the_run_whatever_its_folder_is_called(run_folder: Path, tmp_path: Path) -> None:
    named = Path(shutil.copytree(run_folder, tmp_path / "first@home"))
    for target in (str(named), f"{named}@nf4"):
        assert default_out(["model.gguf", target]) == named / "eval"


def test_options_have_the_defaults_of_the_command_line() -> None:
    assert replace(EvalOptions(), window=512, stride=256, batch_size=8, kl_tokens=8192) == EvalOptions()
