"""Which tokens are learnt and what each counts: label by label, and the loss that comes of it, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from qft.data.batch import Collator
from qft.data.formats import FORMATS
from qft.data.sources import BadRow
from qft.data.template import IGNORED, Encoded, Encoder
from qft.errors import DataError
from qft.memory.fused_loss import fuse_loss
from tests.support.models import CHATML, byte_tokenizer, tiny_llama

TOKENIZER = byte_tokenizer(CHATML)
END = "<|im_end|>"


def row(*weights: Any, roles: str = "uaua") -> dict[str, Any]:
    """Turns that say "0", "1", …, each with its weight if there are any."""
    names = {"u": "user", "a": "assistant"}
    turns: list[dict[str, Any]] = [{"role": names[role], "content": str(i)} for i, role in enumerate(roles)]
    for turn, weight in zip(turns, weights, strict=bool(weights) and len(weights) == len(turns)):
        turn |= {} if weight is None else {"weight": weight}
    return {"messages": turns}


def encoded(fields: dict[str, Any], form: str = "messages", template: str | None = CHATML, **data: Any) -> Encoded:
    [example] = Encoder(byte_tokenizer(template), 4096, **data)(FORMATS[form](fields))
    return example


def learnt(example: Encoded) -> list[str]:
    """The runs of tokens that are learnt, as text."""
    runs, before = list[list[int]](), IGNORED
    for label in example.labels:
        if label != IGNORED:
            runs = [*runs[:-1], [*runs[-1], label]] if before != IGNORED else [*runs, [label]]
        before = label
    return [str(TOKENIZER.decode(run)) for run in runs]


@pytest.mark.parametrize(
    ("loss_on", "eos", "runs"),
    [
        ("assistant", "turn", ["1" + END, "3" + END]),
        ("assistant", "last", ["1", "3" + END]),
        ("assistant", "none", ["1", "3"]),
        ("assistant", "all", [END, "1" + END, END, "3" + END]),
        ("last_assistant", "turn", ["3" + END]),
        ("last_assistant", "last", ["3" + END]),
        ("last_assistant", "none", ["3"]),
        ("last_assistant", "all", [END, END, END, "3" + END]),
    ],
)
def test_turns_and_their_ends_are_learnt_as_asked(loss_on: str, eos: str, runs: list[str]) -> None:
    example = encoded(row(), loss_on=loss_on, train_on_eos=eos)
    assert learnt(example) == runs
    assert example.weights == []


def test_of_all_tokens_the_ends_are_left_out_as_asked() -> None:
    ends = [
        example.labels.count(TOKENIZER.eos_token_id)
        for example in (encoded(row(), loss_on="all", train_on_eos=eos) for eos in ("turn", "all", "last", "none"))
    ]
    assert ends == [4, 4, 1, 0]
    whole, without = (encoded(row(), loss_on="all", train_on_eos=eos) for eos in ("turn", "none"))
    gone = [label for label, other in zip(whole.labels, without.labels, strict=True) if other == IGNORED]
    assert gone == [TOKENIZER.eos_token_id] * 4


def test_the_end_of_a_turn_that_weighs_nothing_is_never_learnt() -> None:
    fields = row(None, None, None, 0)
    assert learnt(encoded(fields, train_on_eos="last")) == ["1" + END]
    assert learnt(encoded(fields, train_on_eos="all")) == [END, "1" + END, END]


@pytest.mark.parametrize(("eos", "ends"), [("turn", 1), ("all", 1), ("last", 1), ("none", 0)])
def test_texts_without_turns_end_as_asked(eos: str, ends: int) -> None:
    pair = {"prompt": "a", "completion": "b"}
    for fields, form, text in (({"text": "ab"}, "text", "ab"), (pair, "prompt_completion", "b")):
        example = encoded(fields, form, None, train_on_eos=eos)
        assert learnt(example) == [text + END * ends]


def test_a_turn_before_the_last_cannot_ask_to_be_learnt() -> None:
    with pytest.raises(BadRow, match=r"messages\.1: only the last turn is learnt"):
        encoded(row(None, 1, None, None), loss_on="last_assistant")


def weighed(example: Encoded) -> list[tuple[str, float]]:
    """Runs of tokens of one weight."""
    found = list[tuple[list[int], float]]()
    for token, weight in zip(example.input_ids, example.weights, strict=True):
        if found and found[-1][1] == weight:
            found[-1][0].append(token)
        else:
            found.append(([token], weight))
    return [(str(TOKENIZER.decode(ids)), weight) for ids, weight in found]


@pytest.mark.parametrize(
    ("fields", "data", "runs"),
    [
        (
            row(roles="ua"),
            {"prompt_loss_weight": 0.25},
            [("<|im_start|>user\n0<|im_end|>\n<|im_start|>assistant\n", 0.25), ("1<|im_end|>", 1.0), ("\n", 0.25)],
        ),
        (
            row(None, 0.5, roles="ua"),
            {},
            [("<|im_start|>user\n0<|im_end|>\n<|im_start|>assistant\n", 0.0), ("1<|im_end|>", 0.5), ("\n", 0.0)],
        ),
        (
            row(None, 0, None, None),
            {"prompt_loss_weight": 0.5, "train_on_eos": "last"},
            [
                ("<|im_start|>user\n0", 0.5),
                ("<|im_end|>", 0.0),
                ("\n<|im_start|>assistant\n", 0.5),
                ("1<|im_end|>", 0.0),
                ("\n<|im_start|>user\n2", 0.5),
                ("<|im_end|>", 0.0),
                ("\n<|im_start|>assistant\n", 0.5),
                ("3<|im_end|>", 1.0),
                ("\n", 0.5),
            ],
        ),
    ],
    ids=["prompt", "message", "message and prompt"],
)
def test_each_token_counts_as_asked(fields: dict[str, Any], data: dict[str, Any], runs: list[Any]) -> None:
    assert weighed(encoded(fields, **data)) == runs


def records(*examples: Encoded) -> list[dict[str, Any]]:
    return [
        {"input_ids": one.input_ids, "labels": one.labels, "weights": one.weights, "source": 0, "row": i}
        for i, one in enumerate(examples)
    ]


def reference(model: Any, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """By hand in float64, one example after the other: the weighted mean, and its gradient of the embeddings."""
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for each in rows:
        weights = each["weights"] or [float(label != IGNORED) for label in each["labels"]]
        ids = torch.tensor([each["input_ids"]])
        losses = cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        total = total + (losses * torch.tensor(weights[1:])).sum()
        count += sum(weights[1:])
    loss = total / count
    return loss.detach(), torch.autograd.grad(loss, model.get_input_embeddings().weight)[0]


def test_a_weight_that_nobody_foresaw_stops_a_training() -> None:
    with pytest.raises(DataError, match="none of the first rows did"):
        Collator(2)(records(encoded(row(None, 0.5, None, None))))


@pytest.mark.parametrize("laid", ["padded", "packed", "side by side"])
def test_the_loss_is_the_weighted_mean(laid: str) -> None:
    model = tiny_llama().double()
    rows = records(
        encoded(row(None, 0.5, None, None), prompt_loss_weight=0.25),
        encoded(row(roles="ua")),
        encoded(row(None, 0, None, None), prompt_loss_weight=0.5, train_on_eos="last"),
    )
    wanted, slope = reference(model, rows)
    given: Any = {"padded": rows, "packed": [rows[:2], rows[2:]], "side by side": [[each] for each in rows]}[laid]
    batch = Collator(2, weighted=True, side_by_side=laid == "side by side")(given)
    weights, labels = batch["loss_weights"], batch["labels"]
    assert torch.equal(weights > 0, labels != IGNORED)
    assert (
        batch["learnt_tokens"] == tuple(int((each[1:] != IGNORED).sum()) for each in labels) or laid == "side by side"
    )
    if laid != "padded":  # what each sees is another test's: here labels and weights lie where their tokens do
        assert sum(map(sum, weights.tolist())) == pytest.approx(
            sum(sum((each["weights"] or [float(label != IGNORED) for label in each["labels"]])[1:]) for each in rows)
        )
        assert torch.equal(labels[labels != IGNORED], batch["input_ids"][labels != IGNORED])
        return
    assert fuse_loss(model, 4 * 300 * 7, always=True)
    asked = {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "loss_weights")}
    loss = model(**asked).loss
    assert float(loss.detach()) == pytest.approx(float(wanted), rel=1e-9)
    found = torch.autograd.grad(loss, model.get_input_embeddings().weight)[0]
    torch.testing.assert_close(found, slope, rtol=1e-7, atol=1e-10)
