"""Memory traced on tensors without contents is that of the same step with real ones, of any model."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qft.checkpoint.skeleton import find_blocks
from qft.kernels import FLOAT8, LINEAR, MLP, NORM, ROTARY
from qft.machine.device import absent_gpu
from qft.memory.ledger import Ledger, Peak
from qft.memory.predict import Source, predictor
from qft.memory.repeated import Pattern, pattern
from qft.memory.trace import few_blocks, trace, traced
from qft.memory.work import MIDDLE, Batch, Step, Work
from qft.quant.hold import SCHEMES
from qft.recipe.training import QuantSection

COMMON = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "pad_token_id": 0}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_positions": 64},
    "phi": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 1e-9},
    "falcon": {},
    "cohere": {},
}
LORA = {"r": 4, "lora_alpha": 8.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
BATCH = Batch(2, 24, padded=True)
ONCE = Step(BATCH, kept="all", accumulates=False)
AGAIN = Step(BATCH, kept="inputs", accumulates=True)


def config(kind: str, layers: int) -> Any:
    name = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    return AutoConfig.for_model(kind, **COMMON | KINDS[kind] | {name: layers})


def skeleton(kind: str, layers: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config(kind, layers), dtype=dtype)
    made.tie_weights()
    return made


def work(mode: str = "none", **changes: Any) -> Work:
    quant = QuantSection.model_validate({"mode": mode})
    scheme = SCHEMES[mode](quant, "float32", ("lm_head",))
    made = Work(
        scheme, LORA, "adamw_torch", 0.0, False, None, on_gpu=False, logit_bytes=None, offloads=False, held_out=BATCH
    )
    return dataclasses.replace(made, **changes)


def of(kind: str, asked: Work, step: Step, layers: int = 3, *, real: bool = False) -> dict[str, Peak]:
    """Of the whole model."""
    model = skeleton(kind, layers, asked.mixed or torch.float32)
    blocks = find_blocks(model, layers)[1]
    tensors = nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True)
    found = traced(model, blocks, pattern(blocks), asked, step, tensors)
    return found.with_optimizer(asked.optim, on_gpu=asked.on_gpu).peaks


def few_of(kind: str, asked: Work, step: Step, layers: int = 3) -> dict[str, Peak]:
    """Of as few of its blocks as tell of the whole."""
    ends = trace(few_blocks(skeleton(kind, layers, asked.mixed or torch.float32), layers), asked, step)
    return ends.with_optimizer(asked.optim, on_gpu=asked.on_gpu).peaks


def totals(found: dict[str, Peak]) -> dict[str, int]:
    return {part: peak.total for part, peak in found.items()}


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        *(pytest.param(kind, (ONCE, AGAIN)[number % 2], id=kind) for number, kind in enumerate(KINDS)),
        *(pytest.param(*case, id=f"{case[0]} too") for case in (("llama", AGAIN), ("mixtral", AGAIN))),
    ],
)
def test_a_step_without_contents_takes_what_a_real_one_does(kind: str, step: Step) -> None:
    # On a CPU, the library multiplies experts as one in 16 bits alone.
    asked = work(mixed=torch.bfloat16 if kind == "mixtral" else None, held_out=BATCH if step == ONCE else None)
    real = totals(of(kind, asked, step, 2, real=True))
    # How many rows an expert is given, numbers say; without any, each is given as many.
    assert totals(of(kind, asked, step, 2)) == pytest.approx(real, rel=0.03 if kind == "mixtral" else 0, abs=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed": torch.bfloat16, "held_out": BATCH},
        {"lora": None},
        {"lora": LORA | {"use_dora": True}},
        {"lora": LORA | {"lora_dropout": 0.1}},
        {"lora": LORA | {"modules_to_save": ["lm_head"]}},
        {"label_smoothing_factor": 0.1, "neftune": True},
        {"logit_bytes": 4 * 96 * 8, "held_out": BATCH},
    ],
    ids=str,
)
def test_so_does_one_of_other_settings(changes: dict[str, Any]) -> None:
    asked = work(**{"held_out": None} | changes)
    assert totals(of("llama", asked, AGAIN, 2)) == totals(of("llama", asked, AGAIN, 2, real=True))


ROUNDED: dict[str, dict[str, Any]] = {
    "w8a8-static": {"learn_scales": True},
    "nvfp4": {},
    "q8_0": {},
    "nf4": {},
    "mxfp4": {},
}


def rounded(target: str, **changes: Any) -> Work:
    quant = QuantSection.model_validate({"mode": "qat", "target": target} | ROUNDED[target])
    scheme = SCHEMES["qat"](quant, "bfloat16", () if target == "q8_0" else ("lm_head",))
    return dataclasses.replace(work(**changes), scheme=scheme)


@pytest.mark.parametrize(
    ("target", "lora", "step"),
    [("nvfp4", LORA, AGAIN), ("w8a8-static", LORA, ONCE), ("q8_0", None, ONCE)],
)
def test_so_does_one_whose_weights_are_rounded(target: str, lora: dict[str, Any] | None, step: Step) -> None:
    asked = rounded(target, lora=lora, mixed=torch.bfloat16)
    assert totals(of("llama", asked, step, 2)) == totals(of("llama", asked, step, 2, real=True))


def test_so_does_one_that_learns_from_itself_unrounded() -> None:
    """The more tokens are learnt, the more logits are held in float32, of both models."""
    asked = rounded("mxfp4", mixed=torch.bfloat16, distill=0.5, held_out=None)

    def found(step: Step, learnt: int, *, real: bool) -> dict[str, int]:
        batch = dataclasses.replace(BATCH, learnt=learnt)
        return totals(of("llama", asked, dataclasses.replace(step, batch=batch), 2, real=real))

    few, many = (found(ONCE, learnt, real=False) for learnt in (8, 40))
    assert max(many["forward"], many["head"]) - max(few["forward"], few["head"]) > 2 * (40 - 8) * 96 * 4
    assert many == found(ONCE, 40, real=True)
    assert found(AGAIN, 8, real=False) == found(AGAIN, 8, real=True)


def test_a_library_that_looks_at_numbers_is_traced_by_what_it_takes() -> None:
    """Rounding to nf4 is bitsandbytes'; its codes and scales are less than what rounding to int4 takes."""
    own: dict[str, Any] = {"mixed": torch.bfloat16, "held_out": None}
    taken = {target: of("llama", rounded(target, **own), AGAIN, 2) for target in ("nf4", "mxfp4")}
    plain = of("llama", work(**own), AGAIN, 2)["last blocks"].total
    assert plain < taken["nf4"]["last blocks"].total <= taken["mxfp4"]["last blocks"].total


@pytest.mark.parametrize(
    ("kind", "step", "on_gpu"),
    [("llama", ONCE, True), ("llama", AGAIN, False), ("gemma3_text", AGAIN, True), ("mixtral", ONCE, False)],
)
def test_few_blocks_tell_of_many(kind: str, step: Step, on_gpu: bool) -> None:
    layers = {"gemma3_text": 8, "mixtral": 5}.get(kind, 6)
    lora = LORA | {"target_modules": ["q_proj", "down_proj", "w2"]}
    asked = work(on_gpu=on_gpu, mixed=torch.bfloat16, held_out=BATCH if kind == "llama" else None, lora=lora)
    whole = totals(of(kind, asked, step, layers))
    found = few_of(kind, asked, step, layers)
    assert totals(found) == pytest.approx({part: size for part, size in whole.items() if part != MIDDLE}, abs=2048)
    assert whole[MIDDLE] <= max(size for part, size in whole.items() if part != MIDDLE)


def test_blocks_that_are_no_pattern_are_all_traced() -> None:
    settings = COMMON | KINDS["gemma3_text"] | {"num_hidden_layers": 5}
    odd = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **settings, layer_types=odd))
    assert pattern(model.model.layers) == Pattern(0, 5, 0, 0)


@pytest.mark.parametrize("mode", ["4bit", "8bit"])
def test_a_quantized_base_is_counted_as_its_scheme_holds_it(mode: str) -> None:
    whole = of("llama", work(mode), ONCE)
    held, plain = whole["forward"].parts, of("llama", work(held_out=None), ONCE)["forward"].parts
    linear = sum(m.weight.numel() for n, m in skeleton("llama", 3).named_modules() if n.endswith("_proj"))
    scheme = work(mode).scheme
    sizes = [m.weight.shape for n, m in skeleton("llama", 3).named_modules() if n.endswith("_proj")]
    packed = sum(scheme.weight_bytes(*size) or 0 for size in sizes)
    saved = plain["base_weights"] - held["base_weights"]
    assert saved == pytest.approx(4 * linear - packed, abs=512 * len(sizes))
    assert totals(few_of("llama", work(mode), ONCE)) == totals(whole)


def test_what_is_drawn_in_training_is_not_drawn_before() -> None:
    noisy, before = work(neftune=True, lora=LORA | {"lora_dropout": 0.1}), torch.get_rng_state()
    few_of("llama", noisy, ONCE)
    assert torch.equal(torch.get_rng_state(), before)


def test_where_numbers_are_in_the_way_shapes_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    def silu(x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor:
            raise ValueError("numbers that mean nothing")
        return x * x.sigmoid()

    expected = few_of("llama", work(), AGAIN)
    monkeypatch.setattr(torch.nn.functional, "silu", silu)
    found = few_of("llama", work(), AGAIN)
    assert found.keys() == expected.keys()


def test_what_a_gpu_drops_keeps_a_byte_of_each_number() -> None:
    def block(dropout: float, *, on_gpu: bool) -> int:
        lora = LORA | {"target_modules": ["q_proj"], "lora_dropout": dropout}
        asked = work("4bit", on_gpu=on_gpu, mixed=torch.bfloat16, lora=lora)
        two, three = (of("llama", asked, ONCE, layers)["forward"].total for layers in (2, 3))
        return three - two

    numbers = BATCH.rows * BATCH.tokens * COMMON["hidden_size"]
    assert block(0.1, on_gpu=True) - block(0, on_gpu=True) == numbers
    assert block(0.1, on_gpu=False) - block(0, on_gpu=False) == 2 * numbers


def test_layers_that_are_given_float32_are_fused_where_there_is_autocast() -> None:
    """Layer norms make float32 then; q, k and v, which are given the same, keep one copy of it in 16 bits."""
    copy = BATCH.rows * BATCH.tokens * COMMON["hidden_size"] * torch.bfloat16.itemsize

    def block(kernels: tuple[str, ...]) -> int:
        asked = work("4bit", on_gpu=True, mixed=torch.bfloat16, kernels=kernels)
        scheme = SCHEMES["4bit"](QuantSection.model_validate({"mode": "4bit"}), "bfloat16", ("lm_head",))
        asked = dataclasses.replace(asked, scheme=scheme)
        two, three = (of("phi", asked, ONCE, layers)["forward"].parts["activations"] for layers in (2, 3))
        return three - two

    assert block(()) - block((LINEAR,)) >= 2 * copy


def test_of_kernels_no_more_is_expected_than_can_be_tried_without_weights() -> None:
    """Cohere's norms take the mean off, and its positions turn neighbours."""
    kinds = (NORM, ROTARY)
    plain, fused = (of("cohere", work("4bit", on_gpu=True, mixed=torch.bfloat16, kernels=k), ONCE) for k in ((), kinds))
    assert totals(plain) == totals(fused)


def test_a_step_in_float8_is_traced() -> None:
    scheme = SCHEMES["4bit"](QuantSection.model_validate({"mode": "4bit"}), "bfloat16", ("lm_head",))
    asked = work("4bit", on_gpu=True, mixed=torch.bfloat16, kernels=(MLP, LINEAR, FLOAT8), scheme=scheme)
    half = dataclasses.replace(asked, kernels=(MLP, LINEAR))
    for step in (ONCE, AGAIN):
        assert of("llama", asked, step)["last blocks"].total != of("llama", half, step)["last blocks"].total


def test_optimizers_keep_what_they_keep() -> None:
    few = few_blocks(skeleton("llama", 2), 2)
    ends = trace(few, work(lora=None, held_out=None), ONCE)

    def state(optim: str) -> int:
        return ends.with_optimizer(optim, on_gpu=False).peaks["update"].parts.get("optimizer_state", 0)

    count = sum(p.numel() for p in skeleton("llama", 2).parameters())
    assert state("adamw_torch") == pytest.approx(8 * count, rel=0.05)
    assert state("lion_32bit") == pytest.approx(4 * count, rel=0.05)
    assert state("paged_adamw_32bit") == pytest.approx(8 * count, rel=0.05), "small moments are not paged"
    assert state("sgd") == 0


def test_the_ledger_counts_a_storage_once_and_until_nobody_holds_it() -> None:
    ledger = Ledger(lambda tensor, label: label)
    with ledger:
        ledger.part, ledger.label = "one", "first"
        kept = torch.empty(1000, dtype=torch.uint8)
        view = kept[10:]
        ledger.label = "second"
        gone = torch.empty(100, dtype=torch.float32)
        del gone
        ledger.part = "two"
        del kept
        late = torch.empty(1, dtype=torch.uint8)
        del view
    found = ledger.peaks()
    assert found["one"] == Peak(1024 + 512, {"first": 1024, "second": 512})
    assert found["two"].total == 1024 + 512
    del late


def test_answers_hold_keys_and_values_of_all_their_tokens() -> None:
    asked = (work(answered=Batch(2, tokens, padded=True), held_out=None) for tokens in (64, 128))
    few, many = (of("llama", each, ONCE, 2)["answers"] for each in asked)
    values = 2 * 2 * 2 * 8 * 4  # keys and values of 2 blocks, of 2 heads of 8 float32 numbers
    assert many.total - few.total >= 64 * 2 * values
    assert many.parts.get("logits", 0) < 128 * 96 * 4


def test_of_blocks_that_wait_elsewhere_two_are_there() -> None:
    """The shape of Llama-3 8B in nf4 took 2.52 GiB on an H100 for 1 x 2048 tokens, and 5.40 GiB for 4 x 2048."""
    asked = (work(offloads=on, held_out=None) for on in (False, True))
    here, elsewhere = (of("llama", each, ONCE, 4)["forward"].parts["base_weights"] for each in asked)
    model = skeleton("llama", 4)
    block = sum(p.numel() * 4 for p in model.model.layers[0].parameters() if p.dim() > 1)
    table = model.model.embed_tokens.weight.numel() * 4
    assert here - elsewhere == pytest.approx(2 * block + table, abs=512 * 40)


def test_a_file_that_is_dequantized_whole_is_on_the_host_meanwhile() -> None:
    plain, whole = (
        predictor(Source("two blocks", lambda: skeleton("llama", 2), 2, 2**20, count), work(), absent_gpu(2**33))(ONCE)
        for count in (0, 2**33)
    )
    assert plain.parts == whole.parts
    assert whole.host - plain.host == pytest.approx(2**33, abs=2**26)
