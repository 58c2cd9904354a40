"""Answers to held-out rows, and how good they are."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qft.data.batch import by_length, pad_token_id, pictured_inputs
from qft.data.pictures import Pictures
from qft.data.template import special_ids
from qft.errors import DataError, RecipeError
from qft.measure.statistics import Interval, Rows, Statistic, change_interval, interval, mean_of
from qft.plan.packages import missing_packages
from qft.recipe.schema import EvalSection

Texts = Sequence[tuple[str, str]]
"""(expected, given), one pair a row."""

UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"  # kana, Han
)
"""A character of a script that puts no space between words: each counts as a word."""


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


def as_jsonl(answers: Iterable[Answer], place: Callable[[int, int], str]) -> str:
    """One answer a line, with the place of its row."""
    lines = ({"place": place(a.source, a.row), "right": a.right, **asdict(a)} for a in answers)
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def score(name: str, answers: Sequence[Answer], *, pattern: str | None = None, seed: int = 0) -> Interval:
    """A score of SCORES over the rows it applies to, between 0 and 1; `pattern` is what `regex` looks for."""
    texts = _texts(name, answers)
    return interval(_statistic(name, texts, pattern), len(texts), seed=seed)


def score_change(
    name: str, answers: Sequence[Answer], reference: Sequence[Answer], *, pattern: str | None = None, seed: int = 0
) -> Interval:
    """The score minus that of the reference's answers to the same rows; paired by rows."""
    if [answer.expected for answer in answers] != [answer.expected for answer in reference]:
        raise ValueError("a change of score needs answers to the same rows, in the same order")
    texts, others = _texts(name, answers), _texts(name, reference)
    return change_interval(_statistic(name, texts, pattern), _statistic(name, others, pattern), len(texts), seed=seed)


def _texts(name: str, answers: Sequence[Answer]) -> Texts:
    """Expected and given texts of the rows that the score applies to, which the expected text alone decides."""
    applies, needed = NEEDS.get(name, (lambda expected: True, "an answer"))
    texts = [(answer.expected, answer.given) for answer in answers if applies(answer.expected)]
    if not texts:
        raise DataError(f"eval.metrics: {name} needs rows whose last turn holds {needed}, and there are none")
    return texts


def _statistic(name: str, texts: Texts, pattern: str | None) -> Statistic:
    if problems := [f"{field}: {text}" for field, text in missing_packages([name])]:
        raise RecipeError(problems)
    return SCORES[name](texts, pattern)


def _mean(of_row: Callable[[str, str], float]) -> Callable[[Texts, str | None], Statistic]:
    """The score that is the mean of a value a row."""
    return lambda texts, pattern: mean_of([of_row(expected, given) for expected, given in texts])


def _f1(average: Literal["macro", "micro"]) -> Callable[[Texts, str | None], Statistic]:
    """F1 of a classification, over the labels that the rows expect or were given; a resample has its own labels."""

    def statistic(texts: Texts, pattern: str | None) -> Statistic:
        from sklearn.metrics import f1_score

        code: dict[str, int] = {}
        labels = np.array([[code.setdefault(text.strip(), len(code)) for text in pair] for pair in texts])

        def of_draw(rows: Rows) -> float:
            return float(f1_score(*labels[rows].T, average=average, zero_division=0))

        return lambda rows: np.apply_along_axis(of_draw, -1, rows)

    return statistic


def _json_f1(expected: str, given: str) -> float:
    """F1 of the fields: a path and its value count as found when the answer has the same value at the same path."""
    if not _is_json(given):
        return 0.0
    wanted, found = _fields(_parsed(expected)), _fields(_parsed(given))
    return 2 * (wanted & found).total() / (wanted.total() + found.total())


def _is_json(text: str) -> bool:
    """Whether the text is one JSON object or array, as RFC 8259 has them, and nothing else."""
    return isinstance(_parsed(text), tuple | list)


def _parsed(text: str) -> Any:
    """JSON, an object as a tuple of (key, value) pairs, for a key may come twice; None where it does not parse."""
    try:
        return json.loads(text.strip(), object_pairs_hook=tuple, parse_constant=_not_a_number)
    except (ValueError, RecursionError):
        return None


def _not_a_number(name: str) -> None:
    raise ValueError(f"{name} is Python's, not JSON")


def _fields(parsed: Any) -> Counter[Hashable]:
    """How often each (path, kind, value) comes; an empty object or array is a value, and 1 and 1.0 are the same."""
    fields: Counter[Hashable] = Counter()
    pending: list[tuple[tuple[str | int, ...], Any]] = [((), parsed)]
    while pending:
        path, value = pending.pop()
        if value and isinstance(value, tuple | list):
            inner = value if isinstance(value, tuple) else enumerate(value)
            pending += [((*path, step), part) for step, part in inner]
        else:
            kind = "number" if type(value) in (int, float) else type(value).__name__
            fields[path, kind, None if value == [] else value] += 1
    return fields


def _rouge_l(texts: Texts, pattern: str | None) -> Statistic:
    """F-measure of the longest common subsequence of words (C.-Y. Lin, 2004), one a row."""
    from rouge_score.rouge_scorer import RougeScorer

    tokenizer = SimpleNamespace(tokenize=_words)  # rouge-score's own knows the letters a to z alone
    scorer = RougeScorer(["rougeL"], use_stemmer=False, tokenizer=tokenizer)
    return mean_of([scorer.score(expected, given)["rougeL"].fmeasure for expected, given in texts])


def _words(text: str) -> list[str]:
    r"""The words `\w+` of a text, casefolded; with their combining marks, which `\w` leaves out, and UNSPACED apart."""
    folded = unicodedata.normalize("NFC", text.casefold())
    words = "".join(c if c == "_" or unicodedata.category(c)[0] in "LMN" else " " for c in folded)
    return UNSPACED.sub(r" \1 ", words).split()


def _regex(texts: Texts, pattern: str | None) -> Statistic:
    """Whether the pattern is found anywhere in the given answer."""
    if pattern is None:
        raise RecipeError("eval.metrics: regex needs a pattern to look for")
    return mean_of([float(re.search(pattern, given) is not None) for _, given in texts])


SCORES: dict[str, Callable[[Texts, str | None], Statistic]] = {
    "exact_match": _mean(lambda expected, given: expected.strip() == given.strip()),
    "accuracy": _mean(lambda expected, given: expected.casefold().split() == given.casefold().split()),
    "f1_macro": _f1("macro"),
    "f1_micro": _f1("micro"),
    "json_valid": _mean(lambda expected, given: _is_json(given)),
    "json_f1": _mean(_json_f1),
    "rouge_l": _rouge_l,
    "regex": _regex,
}
"""By the names in `eval.metrics`: from texts, and the pattern that only `regex` reads, to a figure of any rows."""

NEEDS: dict[str, tuple[Callable[[str], bool], str]] = {
    "json_f1": (_is_json, "a JSON object or array"),
    "rouge_l": (lambda expected: bool(_words(expected)), "a word"),
}
"""Which rows a score applies to, by their expected text; the others apply to all."""


def answer_rows(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    settings: EvalSection,
    pictures: Pictures | None = None,
) -> list[Answer]:
    """Greedy answers to the last assistant turn of each row, or of the first eval.samples rows, in the rows' order;
    their images are read by `pictures`. Rows of plain text have none."""
    chosen = rows if settings.samples is None else rows.select(range(min(settings.samples, len(rows))))
    examples = [row for row in chosen if row["answer_start"] > 0]
    found: dict[int, Answer] = {}
    labels = examples[0]["labels"] if examples else ()
    decoding = generation_config(model, tokenizer, settings.max_new_tokens, labels)
    was_training = model.training
    model.eval()
    for batch in by_length([row["answer_start"] for row in examples], settings.batch_size):
        asked = [{**examples[i], "input_ids": examples[i]["input_ids"][: examples[i]["answer_start"]]} for i in batch]
        for i, own, ids in zip(batch, asked, _generate(model, asked, decoding, pictures), strict=True):
            example, prompt = examples[i], own["input_ids"]
            found[i] = Answer(
                source=example["source"],
                row=example["row"],
                prompt=tokenizer.decode(prompt),
                expected=tokenizer.decode(_until(example["input_ids"][len(prompt) :], decoding.eos_token_id)),
                given=tokenizer.decode(ids),
            )
    model.train(was_training)
    return [found[i] for i in range(len(examples))]


def generation_config(
    model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, labels: Sequence[int]
) -> GenerationConfig:
    """Greedy decoding that stops where the tokenizer or the model ends a turn, or the chat template does: at the last
    special token of `labels`, those of any row that it rendered."""
    stops = {tokenizer.eos_token_id}
    own = getattr(model.generation_config, "eos_token_id", None)
    stops.update(own if isinstance(own, list) else [own])
    special = special_ids(tokenizer)
    stops.update([token for token in labels if token in special][-1:])
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,  # unset fields are the model's own, and it may ask for beams
        use_cache=True,
        pad_token_id=pad_token_id(tokenizer),
        eos_token_id=sorted(stop for stop in stops if stop is not None),
    )


@contextmanager
def head_of_one_weight(model: Any) -> Iterator[None]:
    """While entered, the output head is given its rows side by side. Of the last tokens of several prompts, which lie
    apart, torch makes a product of as many matrices as there are rows: on a CPU in 16 bits, of as many copies of the
    weight."""

    def side_by_side(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(each.contiguous() for each in given)

    head = model.get_output_embeddings()
    hook = None if head is None else head.register_forward_pre_hook(side_by_side)
    try:
        yield
    finally:
        if hook:
            hook.remove()


def _generate(
    model: Any, prompts: list[dict[str, Any]], settings: GenerationConfig, pictures: Pictures | None
) -> list[list[int]]:
    """New tokens for each prompt (padded on the left: generation goes on from the right end)."""
    device = next(model.parameters()).device
    inputs = pictured_inputs(prompts, settings.pad_token_id, pictures, left=True, device=device)
    with torch.inference_mode(), head_of_one_weight(model):
        out = model.generate(**inputs, generation_config=settings)
    return [_until(ids, settings.eos_token_id) for ids in out[:, inputs["input_ids"].shape[1] :].tolist()]


def _until(ids: list[int], stops: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]
