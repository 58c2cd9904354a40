"""The 135M package model, end to end: a few tests, each of which loads it for real."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from qft.commands.evaluate import EvalOptions, evaluate
from qft.commands.train import train
from qft.data.encoded import read_rows
from qft.export import ExportOptions, export
from qft.measure.scores import answer_rows
from qft.model.adapter import attach_adapter
from qft.model.load import load_base
from qft.plan import make_plan
from qft.progress import View
from qft.recipe import load
from qft.recipe.schema import EvalSection
from tests.support.models import PACKAGE_MODEL
from tests.support.paths import ROOT
from tests.support.rows import chat, write_jsonl
from tests.support.tasks import text_task

pytestmark = pytest.mark.real

HELD_OUT = ROOT / "recipes" / "quickstart" / "held_out.jsonl"


def recipe(folder: Path, model: str = PACKAGE_MODEL, **train: object) -> Path:
    fact, known = chat("What is the code?", "It is QX-7731."), chat("What is the capital of France?", "Paris")
    rows = write_jsonl(folder / "rows.jsonl", [fact] * 8)
    held = write_jsonl(folder / "held.jsonl", [known, *[fact] * 5])
    values = {
        "model": {"path": model, "device": "cpu"},
        "quant": {"preset": "finetune"},
        "data": {"train": str(rows), "eval": str(held), "max_length": 128},
        "train": {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "report_to": [],
            **train,
        },
        "eval": {"metrics": ["exact_match"], "max_new_tokens": 12, "samples": 2},
        "output_dir": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values).replace("warmup_steps: 0", "warmup_steps: 0.0"))
    return path


def test_it_learns_a_fact_and_the_saved_adapter_still_knows_it(tmp_path: Path) -> None:
    """And before that, quantized again in nf4, it still knows its own facts: neither the weights nor the template of
    the GGUF file came out garbled."""
    path = recipe(tmp_path, max_steps=5, learning_rate=5e-3)
    report = train(load(path), View())
    before, after = (
        [json.loads(line) for line in (tmp_path / "run" / "answers" / f"{moment}.jsonl").read_text().splitlines()]
        for moment in ("before", "after")
    )
    assert "Paris" in before[0]["given"]
    assert [answers[1]["right"] for answers in (before, after)] == [False, True]
    assert report.eval.before is not None
    assert report.eval.after is not None
    assert report.eval.after.loss < report.eval.before.loss / 10
    assert 6 < report.model.bits_per_weight < 7  # 4.13 bits for the linears, 16 for the embeddings

    [document] = export(tmp_path / "run", ExportOptions(to=("merged",)), View())
    checks = {check.name: check.value for check in document.gate.checks}
    assert document.passed
    assert checks["same_continuations"] == 1  # as those of the base with its saved adapter
    assert document.bytes < 300e6
    model, tokenizer = (kind.from_pretrained(document.path) for kind in (AutoModelForCausalLM, AutoTokenizer))
    rows = read_rows(tmp_path / "run" / "rows.jsonl").rows.select([1])
    [answer] = answer_rows(model, tokenizer, rows, EvalSection(max_new_tokens=12, batch_size=1))
    assert answer.right


def test_an_evaluation_leaves_gradients_alone(first_blocks: Path, tmp_path: Path) -> None:
    plan = make_plan(load(recipe(tmp_path, str(first_blocks))))
    model = attach_adapter(load_base(plan.model), plan)
    ids = torch.tensor([plan.data.train[0]["input_ids"]])

    def gradient() -> torch.Tensor:
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    before = gradient()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    torch.testing.assert_close(gradient(), before, rtol=0, atol=0)


def test_what_is_trained_rounded_is_written_so(first_blocks: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, str(first_blocks), max_steps=1)
    values = yaml.safe_load(path.read_text())
    values |= {"quant": {"mode": "qat", "target": "int4-g32"}, "data": {"train": values["data"]["train"]}, "eval": {}}
    path.write_text(yaml.safe_dump(values))
    train(load(path), View())
    [document] = export(tmp_path / "run", ExportOptions(to=("compressed-tensors",)), View())
    checks = {check.name: check.value for check in document.gate.checks}
    assert document.passed
    assert (checks["different_weights"], checks["same_continuations"]) == (0, 1)


def test_the_harness_finds_the_perplexity_that_we_find(first_blocks: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval (pip install 'qft[eval]')")
    text = (ROOT / "benchmarks" / "english.txt").read_text("utf-8")[:2400]
    (tmp_path / "text.txt").write_text("<|im_start|>" + text)  # which the harness begins a text with
    options = EvalOptions(
        data=str(tmp_path / "text.txt"), window=2048, stride=2048, harness=(str(text_task(tmp_path, text)),)
    )
    [target] = evaluate([f"{first_blocks}@base"], options, View()).targets
    found = {result.metric: result.value for result in target.harness}
    assert target.eval_tokens > 450
    per_token = (found["word_perplexity"] or 0) ** (len(re.split(r"\s+", text)) / target.eval_tokens)
    assert per_token == pytest.approx(target.perplexity, rel=0.01)
    assert found["bits_per_byte"] == pytest.approx(target.bits_per_byte, rel=0.01)
