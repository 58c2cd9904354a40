"""The fused loss and a training without masks, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from qft.memory.fused_loss import COUNTS, fuse_loss
from qft.memory.softmax import Tail, gradient_in_place, gradient_in_torch
from qft.memory.unmasked import needs_no_mask, one_row_each

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tail", [Tail(), Tail(0.0625), Tail(1.0, 30.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [7, 8192, 151_936, 256_000])
def test_the_kernel_is_what_torch_computes(width: int, dtype: torch.dtype, tail: Tail) -> None:
    torch.manual_seed(0)
    z = (torch.randn(16, width, device="cuda") * 8).to(dtype)
    classes = torch.randint(0, width, (16,), device="cuda")
    z[0, classes[0]] = 60
    exact = z.double()
    losses, expected = gradient_in_place(z, classes, tail), gradient_in_torch(exact, classes, tail)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-4)
    assert (z.double() - exact).norm() <= {torch.float32: 1e-5}.get(dtype, 5e-3) * exact.norm()


def test_more_numbers_than_32_bits_count() -> None:
    z = torch.randn(9000, 256_000, device="cuda", dtype=torch.bfloat16)
    classes = torch.randint(0, 256_000, (9000,), device="cuda")
    exact = z[-1:].double()
    gradient_in_place(z, classes, Tail())
    gradient_in_torch(exact, classes[-1:], Tail())
    off = float((z[-1].double() - exact[0]).norm() / exact.norm())
    del z
    torch.cuda.empty_cache()  # or what is small and stays would keep the 4 GB from tests that count what is reserved
    assert off <= 5e-3


@pytest.fixture
def model() -> Any:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32_000, num_key_value_heads=2, use_cache=False, **shape)
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16)


def test_errors_are_no_larger_than_those_of_the_plain_path(model: Any) -> None:
    hidden = torch.randn(2, 1024, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 32_000, (2, 1024), device="cuda")
    labels[:, ::3] = -100

    def slope(head: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        logits = (states @ head.t()).float()[:, :-1].flatten(0, 1)
        return torch.autograd.grad(cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum"), states)[0].float()

    weight = model.lm_head.weight.detach()
    exact = slope(weight.float(), hidden.detach().float().requires_grad_())
    plain = slope(weight, hidden)
    assert fuse_loss(model, 2**26)
    fused = torch.autograd.grad(model.forward.of(hidden, labels, None), hidden)[0].float()
    assert (fused - exact).norm() <= 1.2 * (plain - exact).norm()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_of_padded_rows_waits_for_nothing(model: Any) -> None:
    assert needs_no_mask(model)
    assert fuse_loss(model, 2**26)
    ids = torch.randint(0, 32_000, (2, 512), device="cuda")
    labels = ids.clone()
    labels[1, 100:] = -100
    items = torch.tensor(610, device="cuda")

    def step() -> None:
        with one_row_each():
            out = model(input_ids=ids, labels=labels, num_items_in_batch=items, **{COUNTS: (511, 99)})
        out.loss.backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
