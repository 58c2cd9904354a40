"""Tasks of lm-evaluation-harness in `qft eval`: against qft's own figures, on every kind of target, and refusals."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonschema import Draft202012Validator
from peft import LoraConfig, get_peft_model

from qft.commands.evaluate import EvalOptions, evaluate
from qft.commands.train import train
from qft.documents.evaluation import EvalDocument, HarnessResult
from qft.errors import QftError
from qft.measure import harness
from qft.measure.harness import check_tasks, load_tasks, run_tasks
from qft.progress import View
from qft.recipe import load
from qft.recipe.schema import EvalSection
from qft.views.terminal.evaluation import render_comparison
from tests.support.cli import qft
from tests.support.known import known
from tests.support.models import byte_tokenizer, tiny_llama
from tests.support.rows import chat, write_jsonl
from tests.support.runs import HARD
from tests.support.tasks import CHOICES, QUESTIONS, TEXT, answer_task, choice_task, task_file, text_task

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval (pip install 'qft[eval]')"
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A finished nf4 run whose recipe names a task file beside it."""
    folder = tmp_path_factory.mktemp("harness")
    write_jsonl(folder / "train.jsonl", [chat(f"say {i}", f"it is {i}") for i in range(16)])
    choice_task(folder / "tasks")
    recipe = {
        "model": {"path": str(tiny_model), "device": "cpu"},
        "quant": {"preset": "finetune"},
        "data": {"train": "train.jsonl", "eval": "train.jsonl", "max_length": 128},
        "train": HARD | {"report_to": []},
        "eval": {"harness": ["tasks/choices.yaml"], "batch_size": 4},
        "output_dir": "run",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(load(folder / "recipe.yaml"), View())
    return folder / "run"


def measured(*targets: Any, **options: Any) -> EvalDocument:
    return evaluate([str(target) for target in targets], EvalOptions(**options), View())


def by_metric(results: list[HarnessResult]) -> dict[tuple[str, str], HarnessResult]:
    return {(result.task, result.metric): result for result in results}


def test_perplexity_is_that_of_our_own(tiny_model: Path, tmp_path: Path) -> None:
    """The harness scores a text after the token that begins it; so is ours here, and every byte is a token."""
    (tmp_path / "text.txt").write_text("<|bos|>" + TEXT)
    task = text_task(tmp_path)
    targets = [f"{tiny_model}@float32", f"{tiny_model}@nf4"]
    document = measured(*targets, data=str(tmp_path / "text.txt"), harness=(str(task),), window=512, stride=512)
    for target in document.targets:
        found = by_metric(target.harness)
        assert target.eval_tokens == len(TEXT.encode())
        assert found["text", "bits_per_byte"].value == pytest.approx(target.bits_per_byte, rel=1e-4)
        assert found["text", "byte_perplexity"].value == pytest.approx(target.perplexity, rel=1e-3)
        per_word = math.log(known(target.perplexity)) * target.eval_tokens / len(TEXT.split())
        assert math.log(found["text", "word_perplexity"].value or 0) == pytest.approx(per_word, rel=1e-4)
    first, second = (by_metric(target.harness)["text", "bits_per_byte"].value for target in document.targets)
    assert first != second


def test_every_kind_of_target_is_asked(run_folder: Path, tmp_path: Path) -> None:
    names = [f"{run_folder}@base", f"{run_folder}@nf4", f"{run_folder}@8bit", str(run_folder), f"{run_folder}@merged"]
    more = (str(text_task(tmp_path)), str(answer_task(tmp_path)))
    document = measured(*names, harness=more, out=tmp_path / "out")
    for target in document.targets:
        found = by_metric(target.harness)
        assert {task for task, _ in found} == {"choices", "text", "answers"}
        assert found["choices", "acc"].version == "1.5"
        assert found["choices", "acc"].samples == 9
        assert found["choices", "acc"].stderr is not None
        assert found["text", "bits_per_byte"].model_dump(include={"version", "stderr", "samples", "filter"}) == {
            "version": None,
            "stderr": None,
            "samples": 1,
            "filter": None,
        }
        assert found["answers", "exact_match"].filter == "strict"
    base, *_, adapter, merged = (by_metric(t.harness)["text", "bits_per_byte"].value for t in document.targets)
    assert adapter != base
    assert merged == pytest.approx(adapter, rel=0.05)
    assert document.versions["lm_eval"]
    written = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert written["targets"][0]["harness"][0]["task"] == "choices"
    assert "word_perplexity" in (tmp_path / "out" / "report.html").read_text()


def test_a_choice_is_the_likeliest_continuation(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama().eval(), byte_tokenizer()

    def likelihood(context: str, choice: str) -> float:
        ids = torch.tensor([tokenizer(f"{context} {choice}").input_ids])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        return float(log_probs.gather(1, ids[0, 1:, None])[len(tokenizer(context).input_ids) - 1 :].sum())

    right = 0
    for row in QUESTIONS:
        found = [likelihood(f"{row['question']} Answer:", choice) for choice in CHOICES]
        right += found.index(max(found)) == row["answer"]
    assert asked(model, choice_task(tmp_path, num_fewshot=0))["choices", "acc"].value == pytest.approx(right / 9)


def asked(model: Any, *tasks: Path, limit: int | None = None, seed: int = 0) -> dict[tuple[str, str], HarnessResult]:
    loaded = load_tasks({str(task): str(task) for task in tasks}, seed=seed)
    settings = EvalSection(batch_size=4, harness_limit=limit)
    return by_metric(run_tasks(model, byte_tokenizer(), loaded, settings, seed=seed, max_length=512))


def test_two_evaluations_with_one_seed_are_identical(run_folder: Path, tmp_path: Path) -> None:
    more = (str(text_task(tmp_path)), str(answer_task(tmp_path)))
    first = measured(f"{run_folder}@nf4", run_folder, harness=more)
    second = measured(f"{run_folder}@nf4", run_folder, harness=more)
    alone = measured(run_folder)
    assert [target.harness for target in first.targets] == [target.harness for target in second.targets]
    assert alone.targets[0].harness == first.targets[1].harness[:2]  # whatever was asked of which model before


def test_the_seed_draws_the_examples_shown(tmp_path: Path) -> None:
    task = task_file(
        tmp_path,
        "shots",
        [{"question": f"question {i}", "answer": "yes" * i} for i in range(1, 9)],
        ("perplexity",),
        output_type="loglikelihood",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        fewshot_split="test",
        num_fewshot=2,
    )
    model = tiny_llama().eval()
    first, again, other = (asked(model, task, seed=seed)["shots", "perplexity"] for seed in (1, 1, 2))
    assert first == again
    assert first.stderr is not None  # by bootstrap
    assert first.value != other.value


def test_the_limit_is_that_of_the_recipe(run_folder: Path) -> None:
    recipe = run_folder / "limited.yaml"
    recipe.write_text(f"extends: {run_folder.parent / 'recipe.yaml'}\neval: {{harness_limit: 4}}\n")
    [target] = measured(recipe).targets
    assert {result.samples for result in target.harness} == {4}


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    """A head that the adapter holds, on a base whose head is its embeddings."""
    config = LoraConfig(r=4, modules_to_save=["lm_head"], task_type="CAUSAL_LM", ensure_weight_tying=False)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = get_peft_model(tiny_llama(tie_word_embeddings=True), config).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modules_to_save" in name:
                weight.add_(torch.randn_like(weight) * 0.05)
        before = model(ids).logits
        asked(model, choice_task(tmp_path))
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    assert "tie_weights" not in vars(model)


@pytest.fixture
def few_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the thousands of tasks that the harness knows, which it takes ten seconds to read, those of three folders."""
    from lm_eval.tasks import manager

    for name in ("arc", "hellaswag", "lambada"):
        shutil.copytree(Path(manager.__file__).parent / name, tmp_path / "known" / name)
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "known" / "manager.py"))
    monkeypatch.setattr("qft.measure.harness._manager", cache(inspect.unwrap(harness._manager)))


@pytest.mark.usefixtures("few_known")
def test_what_cannot_be_asked_is_one_clear_message(run_folder: Path, tmp_path: Path) -> None:
    def message(task: Path | str, code: int) -> str:
        with pytest.raises(QftError) as caught:
            measured(run_folder, harness=(str(task),))
        assert caught.value.exit_code == code
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("--harness: ")
        return str(caught.value)

    def written(text: str) -> Path:
        (tmp_path / "task.yaml").write_text(text)
        return tmp_path / "task.yaml"

    assert "arc_esy: lm-eval" in message("arc_esy", 2)
    assert "did you mean arc_easy?" in message("arc_esy", 2)
    assert "lambada_openai: what it needs is not to be had" in message("lambada_openai", 3)
    assert "no such task file" in message(tmp_path / "none.yaml", 3)
    assert "not valid YAML" in message(written("task: ["), 2)
    assert "names its task or group" in message(written("- a\n- b\n"), 2)
    assert "cannot be set up" in message(written("task: mine\noutput_type: telepathy\n"), 2)
    task = choice_task(tmp_path)
    (tmp_path / "choices.jsonl").unlink()
    assert "choices.jsonl" in message(task, 3)
    assert "remove it" in message(choice_task(tmp_path, unsafe_code=True), 2)


def test_a_task_is_asked_for_once(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(QftError, match="choices: asked for more than once"):
        measured(run_folder, harness=(str(choice_task(tmp_path)),))


def test_a_failure_on_the_model_names_the_task(run_folder: Path, tmp_path: Path) -> None:
    task = answer_task(tmp_path)
    task.write_text(task.read_text().replace("max_gen_toks: 8", "max_gen_toks: 4096"))
    with pytest.raises(QftError, match=r"answers\.yaml: failed on this model: .*4096") as caught:
        measured(run_folder, harness=(str(task),))
    assert caught.value.exit_code == 6


def test_a_package_that_is_not_there_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QftError, match=r"eval.harness: needs lm-eval; pip install 'qft\[eval\]'"):
        check_tasks({"arc_easy": "eval.harness: arc_easy"})
    check_tasks({})


@pytest.mark.usefixtures("few_known")
def test_check_refuses_a_task_that_is_not_there(run_folder: Path) -> None:
    recipe = run_folder.parent / "recipe.yaml"
    assert qft("check", recipe).exit_code == 0
    refused = qft("check", recipe, "--set", "eval.harness=[hellaswog]")
    assert refused.exit_code == 2
    assert "--set eval.harness: eval.harness: hellaswog: " in refused.stderr
    assert "did you mean hellaswag?" in refused.stderr
    assert qft("check", recipe, "--set", "eval.harness=[none.yaml]").exit_code == 3


def test_json_is_one_document_and_the_tables_show_the_tasks(run_folder: Path, tmp_path: Path) -> None:
    arguments = ("eval", run_folder, "--harness", answer_task(tmp_path), "--out", tmp_path / "out")
    result = qft(*arguments, "--json")
    document = json.loads(result.stdout)
    Draft202012Validator(json.loads(qft("schema", "eval").stdout)).validate(document)
    assert [found["task"] for found in document["targets"][0]["harness"]] == ["choices", "choices", "answers"]
    assert "it/s" not in result.stderr
    from rich.console import Console

    console = Console(width=120, record=True)
    console.print(render_comparison(EvalDocument.model_validate(document)))
    shown = console.export_text()
    assert "lm-evaluation-harness" in shown
    assert "exact_match, strict" in shown
    assert "acc_norm" in shown
