"""Tasks of lm-evaluation-harness, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.support.rows import write_jsonl

TEXT = "The quick brown fox jumps over the lazy dog. " * 8 + "Ünïcödé ends it."

CHOICES = ["it is one", "two", "a third"]

QUESTIONS = [{"question": f"question {i}", "choices": CHOICES, "answer": i % 3} for i in range(9)]


def task_file(folder: Path, name: str, rows: list[Any], metrics: tuple[str, ...], **fields: Any) -> Path:
    """A task file with its rows beside it, named relative to it."""
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / f"{name}.jsonl", rows)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "metric_list": [{"metric": metric} for metric in metrics],
        **fields,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task))
    return path


def choice_task(folder: Path, **fields: Any) -> Path:
    """Three answers to choose from, two other rows shown before each."""
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} Answer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "fewshot_split": "test",
        "num_fewshot": 2,
        "metadata": {"version": 1.5},
    }
    return task_file(folder, "choices", QUESTIONS, ("acc", "acc_norm"), **choice | fields)


def text_task(folder: Path, text: str = TEXT) -> Path:
    metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    return task_file(folder, "text", [{"text": text}], metrics, **rolling)


def answer_task(folder: Path) -> Path:
    rows = [{"question": f"say {i}", "answer": f"it is {i}"} for i in range(4)]
    writing = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
        "filter_list": [{"name": "strict", "filter": [{"function": "take_first"}]}],
    }
    return task_file(folder, "answers", rows, ("exact_match",), **writing)
