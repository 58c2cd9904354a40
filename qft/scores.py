"""Answers to held-out rows, and how many are right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qft.data.batch import pad_token_id

__all__ = ["Answer", "answer_rows", "exact_match"]


@dataclass(frozen=True)
class Answer:
    """What a model said to one row, and what the row says."""

    source: int
    row: int
    prompt: str
    expected: str
    given: str

    @property
    def right(self) -> bool:
        return self.given.strip() == self.expected.strip()


def exact_match(answers: Iterable[Answer]) -> float:
    """Share of the answers that equal the expected ones, outer white space aside."""
    right = [answer.right for answer in answers]
    return sum(right) / len(right)


def answer_rows(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Dataset, *, max_new_tokens: int, batch_size: int
) -> list[Answer]:
    """Greedy answers to the last assistant turn of each row, in the rows' order. Rows of plain text have none."""
    examples = [row for row in rows if row["answer_start"] > 0]
    by_length = sorted(range(len(examples)), key=lambda i: -examples[i]["answer_start"])
    found: dict[int, Answer] = {}
    settings = _generation_config(model, tokenizer, max_new_tokens, examples)
    was_training = model.training
    model.eval()
    for batch in _chunks(by_length, batch_size):
        prompts = [examples[i]["input_ids"][: examples[i]["answer_start"]] for i in batch]
        for i, prompt, ids in zip(batch, prompts, _generate(model, prompts, settings), strict=True):
            example = examples[i]
            found[i] = Answer(
                source=example["source"],
                row=example["row"],
                prompt=tokenizer.decode(prompt),
                expected=tokenizer.decode(_until(example["input_ids"][len(prompt) :], settings.eos_token_id)),
                given=tokenizer.decode(ids),
            )
    model.train(was_training)
    return [found[i] for i in range(len(examples))]


def _generation_config(model: Any, tokenizer: Any, max_new_tokens: int, examples: list[Any]) -> GenerationConfig:
    """Greedy decoding that stops where the tokenizer, the model or the rows themselves end a turn."""
    stops = {tokenizer.eos_token_id}
    own = getattr(model.generation_config, "eos_token_id", None)
    stops.update(own if isinstance(own, list) else [own])
    special = set(tokenizer.all_special_ids)
    for example in examples[:1]:
        learnt = [token for token in example["labels"] if token in special]
        stops.update(learnt[-1:])
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad_token_id(tokenizer),
        eos_token_id=sorted(stop for stop in stops if stop is not None),
    )


def _generate(model: Any, prompts: list[list[int]], settings: GenerationConfig) -> list[list[int]]:
    """New tokens for each prompt (padded on the left: generation goes on from the right end)."""
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), settings.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):
        input_ids[i, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[i, width - len(prompt) :] = 1
    device = next(model.parameters()).device
    with torch.inference_mode():
        out = model.generate(
            input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), generation_config=settings
        )
    return [_until(ids, settings.eos_token_id) for ids in out[:, width:].tolist()]


def _until(ids: list[int], stops: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
