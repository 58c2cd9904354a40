"""Head, loss and gradient in one pass: the loss and the gradients of the model's own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama4.modeling_llama4 import Llama4TextModel
from transformers.models.opt.modeling_opt import OPTDecoder

from qft.memory.chunked_loss import decoder_of
from qft.memory.fused_loss import COUNTS, FusedLoss, allows_chunks, fuse_loss, replace_with, tail_of
from qft.memory.ledger import Ledger
from qft.memory.softmax import WIDE, Tail, gradient_in_torch
from tests.support.models import tiny_llama

WIDTH = 264
COMMON = {
    "vocab_size": WIDTH, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
KINDS: dict[str, tuple[dict[str, Any], Tail | None]] = {
    "llama": ({}, Tail()),
    "qwen2": ({"tie_word_embeddings": True}, Tail()),
    "gemma2": ({"head_dim": 8, "final_logit_softcapping": 5.0}, Tail(cap=5.0)),
    "cohere": ({"logit_scale": 0.25}, Tail(0.25)),
    "granite": ({"logits_scaling": 8.0}, Tail(0.125)),
    "phi": ({}, Tail()),
    "gpt2": ({"n_embd": 32, "n_head": 4, "n_layer": 1}, Tail()),
    "mixtral": ({"num_local_experts": 4}, Tail()),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, Tail()),
    "llama4_text": ({"head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2}, Tail()),
    "bart": ({"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}, None),
}
FEW = 4 * WIDTH * 5
"""Bytes of five rows of logits."""


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON | KINDS[kind][0]))
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    return model.eval()


def batch(rows: int = 3, tokens: int = 13) -> dict[str, torch.Tensor]:
    """Nothing of the first row is learnt, the end of the second, and all of the others."""
    ids = torch.randint(0, WIDTH, (rows, tokens), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0], labels[1, : tokens - 4] = -100, -100
    return {"input_ids": ids, "labels": labels}


def step(model: Any, **given: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def require_same(one: tuple[float, dict[str, torch.Tensor]], other: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, slope in other[1].items():
        torch.testing.assert_close(one[1][name], slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_behind_a_head_is_found_without_weights(kind: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON | KINDS[kind][0]))
    assert tail_of(model) == KINDS[kind][1]


@pytest.mark.parametrize("kind", KINDS)
def test_whether_a_loss_can_be_taken_by_rows_is_told_without_weights(kind: str) -> None:
    """Bart's labels are each of their own place."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON | KINDS[kind][0]))
    assert allows_chunks(model) == (kind != "bart")


def test_a_decoder_is_what_a_model_calls() -> None:
    """OPT goes past its base model, and Llama 4 has none by the name that it gives."""
    assert isinstance(decoder_of(model_of("opt")), OPTDecoder)
    assert isinstance(decoder_of(model_of("llama4_text")), Llama4TextModel)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][1]])
def test_loss_and_gradients_are_those_of_the_model(kind: str) -> None:
    model, given = model_of(kind), batch()
    for items in ({}, {"num_items_in_batch": torch.tensor(40)}):
        expected = step(model, **given, **items)
        whole = model.forward
        assert fuse_loss(model, FEW, always=True)
        counts = (given["labels"][:, 1:] != -100).sum(1).tolist()
        require_same(step(model, **given, **items), expected)
        require_same(step(model, **given, **items, **{COUNTS: counts}), expected)
        model.forward = whole


@pytest.mark.parametrize(
    "lora",
    [{"target_modules": ["lm_head", "q_proj"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=str,
)
def test_a_head_that_is_trained_learns_the_same(lora: dict[str, Any]) -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_llama(tie_word_embeddings=False), LoraConfig(r=4, init_lora_weights=False, **lora))
    expected = step(adapted, **batch())
    assert any("lm_head" in name for name in expected[1])
    assert fuse_loss(adapted.get_base_model(), FEW)
    require_same(step(adapted, **batch()), expected)


def test_eight_rows_at_once_are_eight_one_by_one() -> None:
    model, given, items = model_of("llama"), batch(8), torch.tensor(100)
    assert fuse_loss(model, FEW, always=True)
    loss, slopes = step(model, **given, num_items_in_batch=items)
    model.zero_grad()
    rows = [{name: each[i : i + 1] for name, each in given.items()} for i in range(8)]
    losses = [model(**row, num_items_in_batch=items).loss for row in rows]
    for each in losses:
        each.backward()
    require_same(
        (sum(each.item() for each in losses), {n: p.grad for n, p in model.named_parameters()}), (loss, slopes)
    )


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_rows_of_which_nothing_is_learnt_change_nothing(tokens: int) -> None:
    model = model_of("llama")
    assert fuse_loss(model, FEW, always=True)
    ids = torch.ones(2, tokens, dtype=torch.int64)
    loss, slopes = step(model, input_ids=ids, labels=ids * 0 - 100, num_items_in_batch=torch.tensor(5))
    assert loss == 0
    assert all(not slope.any() for slope in slopes.values())


@pytest.mark.parametrize("tail", [Tail(), Tail(0.5), Tail(2.0, 3.0)], ids=str)
def test_gradients_are_those_of_differences(tail: Tail) -> None:
    torch.manual_seed(0)
    model: Any = tiny_llama(vocab_size=11, hidden_size=64)
    model.lm_head = nn.Linear(6, 11, dtype=torch.float64)
    fused = FusedLoss(model, 4 * 11 * 3, tail)
    labels = torch.tensor([[1, 2, -100, 4, 5], [-100, -100, -100, 7, 10]])
    hidden = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)

    inputs = [hidden, *model.lm_head.parameters()]
    slopes = torch.autograd.grad(fused.of(hidden, labels, None), inputs)
    for each, slope in zip(inputs, slopes, strict=True):
        for place in range(each.numel()):
            ends = []
            for side in (1e-6, -1e-6):
                each.data.view(-1)[place] += side
                ends.append(fused.of(hidden, labels, None).item())
                each.data.view(-1)[place] -= side
            assert slope.view(-1)[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-6)


def test_the_true_class_s_share_does_not_cancel_in_16_bits() -> None:
    z = torch.zeros(1, 300, dtype=torch.bfloat16)
    z[0, 7] = 10
    exact = z.double()
    losses = gradient_in_torch(z, torch.tensor([7]), Tail())
    expected = gradient_in_torch(exact, torch.tensor([7]), Tail())
    assert losses.item() == pytest.approx(expected.item(), rel=1e-3)
    assert z[0, 7].item() == pytest.approx(exact[0, 7].item(), rel=0.01), (
        "of about -0.013: 1 less 0.987 in bfloat16 is 0"
    )


def test_a_model_that_does_something_else_keeps_its_own() -> None:
    smoothed = model_of("llama")
    smoothed.loss_function = lambda logits, labels, **_: torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
    )
    balanced = model_of("mixtral")
    balanced.config.output_router_logits = True
    first = model_of("llama")
    first.lm_head = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, WIDTH))
    assert not any(fuse_loss(model, FEW, always=True) for model in (smoothed, balanced, first))


def test_a_head_whose_outputs_are_needed_again_is_refused() -> None:
    class Squashed(nn.Linear):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return super().forward(given).tanh()  # whose backward pass reads what it gave

    model = model_of("llama")
    model.lm_head = Squashed(32, WIDTH)
    assert tail_of(model) == Tail()
    assert not fuse_loss(model, FEW, always=True)


def test_a_gradient_is_taken_once() -> None:
    model = model_of("llama")
    replace_with(FusedLoss(model, FEW, Tail()))
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken before"):
        loss.backward()


def test_few_rows_at_a_time_are_copied_to_float32() -> None:
    z = torch.randn(2048, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    classes = torch.arange(2048)
    losses = cross_entropy(z.float(), classes, reduction="none")
    ledger = Ledger(lambda *_: "beside")
    with ledger:
        found = gradient_in_torch(z, classes, Tail())
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-5)
    assert ledger.peaks()[""].total < z.nbytes + 2 * WIDE
