"""Errors of single layers: against known noise, closed forms and an independent computation; and what to skip."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from qft.calibration.layer_errors import layer_errors, suggest_skip_modules
from qft.documents.evaluation import LayerError
from qft.errors import ModelError
from qft.memory.meter import weight_bytes
from qft.quant.hold import SCHEMES
from qft.recipe.training import QuantSection
from tests.support.models import tiny_llama

# Those of pyproject.toml, which hold under `-W error` as well when they are given here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
]

LINEARS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def quantized(folder: Path, skip: Sequence[str] = (), dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """The checkpoint in `folder` by bitsandbytes, its head left as it is; nf4 without double quantization if not said.

    It multiplies in float32, so that noise is that of the weights.
    """
    config = BitsAndBytesConfig(llm_int8_skip_modules=["lm_head", *skip], **settings or {"load_in_4bit": True} | NF4)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map="cpu")
    SCHEMES["4bit"](QuantSection(mode="4bit"), "float32", ()).settle(model)
    return model.eval()


NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, **NF4},
    "nf4 double": {"load_in_4bit": True, **NF4, "bnb_4bit_use_double_quant": True},
    "nf4 in bfloat16": {"load_in_4bit": True, **NF4, "bnb_4bit_quant_storage": "bfloat16"},
    "fp4": {"load_in_4bit": True, **NF4, "bnb_4bit_quant_type": "fp4"},
    "8bit": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture
def other(reference: Any) -> Any:
    """A second model of the reference's weights, to be changed."""
    model = tiny_llama().eval()
    model.load_state_dict(reference.state_dict())
    return model


def batch(*rows: list[int], width: int = 0) -> dict[str, torch.Tensor]:
    """Padded on the right to `width`, or to the longest row."""
    width = width or max(map(len, rows))
    ids = torch.tensor([row + [2] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def random_rows(*lengths: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 264, (n,), generator=draw).tolist() for n in lengths]


BATCHES = [batch(*random_rows(9, 16)), batch(*random_rows(5, 12, 3))]


def by_name(errors: list[LayerError]) -> dict[str, LayerError]:
    return {error.name: error for error in errors}


def figures(error: LayerError) -> list[float]:
    return [error.weight_error, error.output_snr_db, error.outlier_share]


def mean(errors: list[LayerError], field: str) -> float:
    """Over the blocks; the head is not quantized."""
    return sum(getattr(error, field) for error in errors if error.block is not None) / (len(errors) - 1)


def test_every_linear_layer_is_named_and_an_identical_model_is_exact(reference: Any, other: Any) -> None:
    errors = layer_errors(reference, other, BATCHES)
    names = [f"model.layers.{block}.{name}" for block in (0, 1) for name in LINEARS]
    assert [error.name for error in errors] == [*names, "lm_head"]
    assert {(error.weight_error, error.output_snr_db) for error in errors} == {(0.0, 200.0)}
    assert by_name(errors)[DOWN].block == 1
    assert by_name(errors)[DOWN].kind == "down_proj"
    assert errors[-1].block is None
    assert errors[-1].kind == "lm_head"
    assert layer_errors(reference, reference, BATCHES) == errors


def test_noise_of_known_size_is_told_and_stays_with_its_layer(reference: Any, other: Any) -> None:
    weight = other.get_submodule(Q).weight.data
    weight += 0.1 * weight.roll(1, 0)  # another output row, so the outputs' noise is a tenth of the signal as well
    errors = by_name(layer_errors(reference, other, BATCHES))
    assert errors[Q].weight_error == pytest.approx(0.1, rel=1e-5)
    assert errors[Q].output_snr_db == pytest.approx(20, rel=1e-5)
    assert {error.output_snr_db for name, error in errors.items() if name != Q} == {200.0}


def test_an_output_drowned_in_noise_has_a_finite_ratio(reference: Any, other: Any) -> None:
    still = tiny_llama().eval()
    still.load_state_dict(reference.state_dict())
    still.get_submodule(Q).weight.data.zero_()
    error = by_name(layer_errors(still, other, BATCHES))[Q]
    assert error.output_snr_db == -200
    assert math.isfinite(error.weight_error)


def test_nf4_is_nearer_than_fp4_and_8bit_nearer_than_both(reference: Any, tiny_model: Path) -> None:
    nf4, fp4, int8 = (
        layer_errors(reference, quantized(tiny_model, **SETTINGS[name]), BATCHES) for name in ("nf4", "fp4", "8bit")
    )
    errors = [mean(each, "weight_error") for each in (int8, nf4, fp4)]
    assert errors == sorted(errors)
    # Rounding of normal weights: nf4 about 0.09 (arXiv:2305.14314), int8 by rows about 1/440 of the largest/rms.
    assert errors == pytest.approx([0.006, 0.09, 0.12], rel=0.25)
    ratios = [mean(each, "output_snr_db") for each in (fp4, nf4, int8)]
    assert ratios == sorted(ratios)
    assert ratios == pytest.approx([-20 * math.log10(error) for error in reversed(errors)], abs=5)


def plain(reference: Any, model: Any, batches: list[dict[str, torch.Tensor]]) -> Iterator[tuple[str, list[float]]]:
    """(name, [weight error, SNR, outlier share]) from all activations at once, by matrix products in float64."""
    for name, module in reference.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        kept: list[torch.Tensor] = []
        handle = module.register_forward_hook(lambda _, inputs, __, kept=kept: kept.append(inputs[0]))
        with torch.no_grad():
            for each in batches:
                reference(**each)
        handle.remove()
        x = torch.cat([full[each["attention_mask"] == 1] for full, each in zip(kept, batches, strict=True)]).double()
        weight, held = module.weight.detach().double(), dense(model.get_submodule(name)).double()
        y, y_held = x @ weight.T, x @ held.T
        outliers = (x.abs() > 6 * x.square().mean().sqrt()).double().mean()
        ratio = 10 * torch.log10(y.square().sum() / (y_held - y).square().sum())
        yield name, [float((held - weight).norm() / weight.norm()), float(ratio), float(outliers)]


def dense(linear: Any) -> torch.Tensor:
    if isinstance(linear, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).detach()
    return linear.weight.detach()


@pytest.mark.parametrize("name", ["nf4", "nf4 double", "nf4 in bfloat16", "fp4"])
def test_keeping_every_activation_gives_the_same(name: str, reference: Any, tiny_model: Path) -> None:
    model = quantized(tiny_model, ["down_proj"], **SETTINGS[name])
    model.get_submodule(DOWN).weight.data *= 1.01
    model.lm_head.weight.data *= 0.99
    errors = by_name(layer_errors(reference, model, BATCHES))
    seen = dict(plain(reference, model, BATCHES))
    del seen["model.layers.0.mlp.down_proj"]  # as in the reference: no noise, no ratio
    for layer, expected in seen.items():
        assert figures(errors[layer]) == pytest.approx(expected, rel=1e-4), layer
    assert len(seen) == len(errors) - 1


def test_int8_weights_are_codes_by_their_rows_scales(reference: Any, tiny_model: Path) -> None:
    model = quantized(tiny_model, load_in_8bit=True)
    error = by_name(layer_errors(reference, model, BATCHES))[Q]
    weight = reference.get_submodule(Q).weight.detach().half().float()  # LLM.int8() starts from float16
    scales = weight.abs().amax(1, keepdim=True)
    held = torch.round(weight / scales * 127) * scales / 127
    original = reference.get_submodule(Q).weight.detach()
    assert error.weight_error == pytest.approx(float((held - original).norm() / original.norm()), rel=1e-3)


def test_other_dtypes_are_compared_in_float32(reference: Any, other: Any) -> None:
    errors = layer_errors(reference, other.bfloat16(), BATCHES)
    assert all(2**-11 < error.weight_error < 2**-9 for error in errors)
    assert all(40 < error.output_snr_db < 60 for error in errors)
    assert by_name(errors)[Q].bytes == 2 * 64 * 64


def test_padding_changes_nothing(reference: Any, tiny_model: Path) -> None:
    rows = random_rows(9, 16, 5)
    model = quantized(tiny_model)
    wide = layer_errors(reference, model, [batch(*rows, width=40)])
    alone = layer_errors(reference, model, [batch(row) for row in rows])
    for padded, one in zip(wide, alone, strict=True):
        assert figures(padded) == pytest.approx(figures(one), rel=1e-5)
    int8 = quantized(tiny_model, load_in_8bit=True, llm_int8_threshold=2.0)
    narrow, wide = (layer_errors(reference, int8, [batch(*rows, width=width)]) for width in (16, 40))
    assert [error.output_snr_db for error in narrow] == pytest.approx([error.output_snr_db for error in wide], rel=1e-3)


def with_inputs(model: Any, *inputs: list[float]) -> Any:
    """Token i's input to the first block's layers is inputs[i], but for one factor, common to the input's numbers."""
    model.model.embed_tokens.weight.data[: len(inputs)] = torch.tensor(inputs)
    return model


def test_outliers_are_told_from_the_whole_input(other: Any) -> None:
    # One of 64 numbers of a token above 6 rms (10 > 6 * 1.6), or not (8 < 6 * 1.41).
    for size, share in ((10.0, 1 / 64), (8.0, 0.0)):
        with_inputs(other, [-size] + [1.0] * 63)
        assert by_name(layer_errors(other, other, [batch([0, 0, 0])]))[Q].outlier_share == share

    # Token 1's numbers are a hundred times larger: beside them, token 0's outlier is none, whatever the batches.
    with_inputs(other, [10.0] + [1.0] * 31 + [0.0] * 32, [0.0] * 32 + [1.0] * 32)
    other.model.layers[0].input_layernorm.weight.data[32:] = 100
    for batches in ([batch([0])], [batch([0]), batch([0])]):
        assert by_name(layer_errors(other, other, batches))[Q].outlier_share == 1 / 64
    for batches in ([batch([0, 1])], [batch([0]), batch([1])], [batch([0, 0], [1])]):
        assert by_name(layer_errors(other, other, batches))[Q].outlier_share == 0


def adapted(model: Any, **settings: Any) -> Any:
    """The model with LoRA adapters whose A and B are random, in evaluation mode."""
    torch.manual_seed(2)
    arguments = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.5} | settings
    model = get_peft_model(model, LoraConfig(**arguments))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape)
    return model


def test_an_adapter_is_its_dense_layer(reference: Any, other: Any, tiny_model: Path) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    for name, layer in model.get_base_model().named_modules():
        if name.endswith(("q_proj", "down_proj")):
            update = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            other.get_submodule(name).weight.data += update.detach()
    expected, found = (by_name(layer_errors(reference, each, BATCHES)) for each in (other, model.train()))
    assert list(found) == list(expected)
    for name, error in found.items():
        assert error.weight_error == pytest.approx(expected[name].weight_error, rel=1e-5)
        assert error.output_snr_db == pytest.approx(expected[name].output_snr_db, rel=1e-4)
    assert found[Q].weight_error > 0.1
    assert found[Q].bytes == expected[Q].bytes + 4 * 4 * (64 + 64)
    assert model.training
    assert not reference.training


@pytest.mark.parametrize("settings", [SETTINGS["nf4"], SETTINGS["8bit"]], ids=["4bit", "8bit"])
def test_an_adapter_adds_to_the_dequantized_base(settings: Any, reference: Any, tiny_model: Path) -> None:
    model = adapted(quantized(tiny_model, **settings)).eval()
    layer = model.get_base_model().get_submodule(Q)
    found = by_name(layer_errors(reference, model, BATCHES))[Q]
    with model.disable_adapter():
        base = by_name(layer_errors(reference, model, BATCHES))[Q]
    assert base == by_name(layer_errors(reference, quantized(tiny_model, **settings), BATCHES))[Q].model_copy(
        update={"bytes": base.bytes}
    )
    # An error and an update that know nothing of each other add by their squares.
    update = 2 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().norm()
    share = float(update / reference.get_submodule(Q).weight.detach().norm())
    assert found.weight_error == pytest.approx(math.hypot(base.weight_error, share), rel=0.05)
    assert found.output_snr_db < base.output_snr_db


def test_only_active_adapters_count(reference: Any, tiny_model: Path) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"]))  # B is zero
    model.set_adapter("second")
    errors = by_name(layer_errors(reference, model, BATCHES))
    assert {error.weight_error for error in errors.values()} == {0.0}
    model.set_adapter("default")
    unmerged = by_name(layer_errors(reference, model, BATCHES))[Q]
    model.merge_adapter()
    merged = by_name(layer_errors(reference, model, BATCHES))[Q]
    assert unmerged.weight_error > 0.1
    assert merged.weight_error == pytest.approx(unmerged.weight_error, rel=1e-5)


def test_dora_is_the_layer_it_merges_to(reference: Any, tiny_model: Path) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), use_dora=True)
    before = by_name(layer_errors(reference, model, BATCHES))[Q]
    after = by_name(layer_errors(reference, model.merge_and_unload(), BATCHES))[Q]
    assert before.weight_error == pytest.approx(after.weight_error, rel=1e-5)
    assert before.output_snr_db == pytest.approx(after.output_snr_db, rel=1e-4, abs=1e-4)


def test_a_head_trained_in_full_is_the_trained_one(reference: Any, tiny_model: Path) -> None:
    model = adapted(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), modules_to_save=["lm_head"]
    ).eval()
    model.get_base_model().lm_head.modules_to_save["default"].weight.data *= 1.1
    head = layer_errors(reference, model, BATCHES)[-1]
    assert head.weight_error == pytest.approx(0.1, rel=1e-4)
    assert head.output_snr_db == pytest.approx(20, rel=1e-4)
    assert head.bytes == 2 * 4 * 264 * 64


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Codes, a scale for each 64 weights, the code book of 16; then what double quantization keeps of its own.
        ("nf4", lambda n, out: n / 2 + n / 64 * 4 + 64),
        ("nf4 double", lambda n, out: n / 2 + n / 64 + math.ceil(n / 64 / 256) * 4 + 64 + 256 * 4 + 4),
        ("nf4 in bfloat16", lambda n, out: n / 2 + n / 64 * 4 + 64),
        ("8bit", lambda n, out: n + 4 * out),
    ],
)
def test_bytes_are_weights_and_scales(
    name: str, expected: Callable[[int, int], float], reference: Any, tiny_model: Path
) -> None:
    model = quantized(tiny_model, **SETTINGS[name])
    for _ in range(2):  # the first pass moves the scales of int8
        errors = by_name(layer_errors(reference, model, BATCHES))
        for layer in (Q, DOWN):
            out, inside = reference.get_submodule(layer).weight.shape
            assert errors[layer].bytes == expected(out * inside, out)
    assert errors["lm_head"].bytes == 4 * 264 * 64


@pytest.mark.parametrize("settings", [SETTINGS["nf4"], SETTINGS["8bit"]], ids=["4bit", "8bit"])
def test_biases_are_counted_and_stay_as_they_are(settings: Any, tmp_path: Path) -> None:
    reference = tiny_llama(attention_bias=True).eval()
    reference.get_submodule(Q).bias.data.normal_()
    reference.save_pretrained(tmp_path)
    bias = reference.get_submodule(Q).bias.clone()
    model = quantized(tmp_path, **settings)
    with_bias = by_name(layer_errors(reference.bfloat16(), model, BATCHES))
    assert model.get_submodule(Q).bias.dtype == torch.float32
    assert torch.equal(model.get_submodule(Q).bias, bias)
    without = by_name(layer_errors(tiny_llama().eval(), quantized(saved(tiny_llama(), tmp_path), **settings), BATCHES))
    assert with_bias[Q].bytes == without[Q].bytes + 4 * 64
    assert with_bias[Q].output_snr_db > 10


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder / "saved")
    return folder / "saved"


def test_a_model_that_is_not_the_references_is_refused_by_layer(reference: Any, other: Any, tiny_model: Path) -> None:
    shorter = tiny_llama(num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"^model\.layers\.1\.self_attn\.q_proj: .* has none"):
        layer_errors(reference, shorter, BATCHES)
    wider = tiny_llama(intermediate_size=192)
    with pytest.raises(ModelError, match=r"^model\.layers\.0\.mlp\.gate_proj: is \[192, 64\].*\[128, 64\]"):
        layer_errors(reference, wider, BATCHES)
    strange = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model), IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )
    with pytest.raises(ModelError, match=r"^model\.layers\.0\.self_attn\.q_proj: .*only LoRA and DoRA"):
        layer_errors(reference, strange, BATCHES)
    other.get_submodule(DOWN).weight.data[0, 0] = math.inf
    with pytest.raises(ModelError, match=r"^model\.layers\.1\.mlp\.down_proj: .*not finite"):
        layer_errors(reference, other, BATCHES)
    other.get_submodule(DOWN).weight.data[0, 0] = 0
    other.lm_head = nn.Identity()
    assert "lm_head" not in by_name(layer_errors(reference, other, BATCHES))


class Routed(nn.Module):
    """Linear layers that get some rows only, as experts do: the first all of them but one, the second none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        return torch.cat([self.experts[0](rows[1:]), rows[:1]]).view_as(x)


def test_padding_that_cannot_be_told_is_refused_and_idle_layers_are_left_out(reference: Any, other: Any) -> None:
    other.model.norm = Routed()
    errors = by_name(layer_errors(other, other, [batch([5, 6, 7])]))
    assert "model.norm.experts.0" in errors
    assert "model.norm.experts.1" not in errors
    assert "model.norm.experts.0" not in by_name(layer_errors(other, other, [batch([5])]))
    with pytest.raises(ModelError, match=r"^model\.norm\.experts\.0: .*without padding"):
        layer_errors(other, other, BATCHES)
    assert not any(module._forward_pre_hooks for module in other.modules())


def made_up(name: str, snr: float, size: int = 100, weight_error: float = 0.1) -> LayerError:
    return LayerError(
        name=name, block=None, kind="", weight_error=weight_error, output_snr_db=snr, outlier_share=0, bytes=size
    )


def suggested(errors: list[LayerError], budget: int, **arguments: Any) -> list[str]:
    """Of layers whose every byte holds two weights."""
    return suggest_skip_modules(errors, {e.name: 2 * e.bytes for e in errors}, budget_bytes=budget, **arguments)


def test_the_worst_layers_that_fit_are_suggested() -> None:
    errors = [made_up("a", 20), made_up("b", 10, 1000), made_up("c", 15), made_up("d", 12), made_up("e", 15, 50)]
    assert suggested(errors, 10000) == ["b", "d", "e", "c", "a"]
    assert suggested(errors, 3000) == ["b"]
    assert suggested(errors, 2999) == ["d", "e", "c", "a"]
    assert suggested(errors, 300) == ["d"]
    assert suggested(errors, 299) == ["e"]
    assert suggested(errors, 149) == []
    assert suggested(errors, 300, full_bits=32) == []
    assert suggested(errors, 300, full_bits=8) == ["d", "e", "c"]


def test_what_is_not_quantized_is_not_suggested() -> None:
    errors = [made_up("exact", 200, weight_error=0), made_up("bfloat16", 50, weight_error=2**-9), made_up("8bit", 40)]
    assert suggested(errors, 10**6) == ["8bit"]


def test_a_name_that_begins_or_ends_another_is_closed() -> None:
    names = ["l.1.gate", "l.1.gate_proj", "l.11.gate", "fc", "l.1.fc", "l.1.up"]
    entries = suggested([made_up(name, 10) for name in names], 10**6)
    assert entries == ["l.1.gate$", "l.1.gate_proj", "l.11.gate", "fc$", "l.1.fc", "l.1.up"]
    for name, entry in zip(names, entries, strict=True):
        assert [other for other in names if not should_convert_module(other, [entry])] == [name]


def test_a_suggestion_keeps_its_layers_and_its_budget(tmp_path: Path) -> None:
    reference = tiny_llama(num_hidden_layers=12).eval()
    worst = ["model.layers.11.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    for size, name in zip((26, 40, 60), worst, strict=True):
        # One large weight in each block of 64, beside which nf4 rounds the others to 0: 63 / (size^2 + 63) is lost.
        weight = reference.get_submodule(name).weight.data
        weight.sign_().mul_(0.02)[:, ::64] *= size
    reference.save_pretrained(tmp_path)
    model = quantized(tmp_path, dtype=torch.bfloat16)
    errors = layer_errors(reference, model, BATCHES)
    before = sum(weight_bytes(model).values())

    everything = suggested(errors, 10**9)
    assert everything[:3] == worst
    assert sorted(everything) == sorted(error.name for error in errors if error.kind != "lm_head")

    budget = 3 * sum(by_name(errors)[name].bytes for name in worst)
    suggestion = suggested(errors, budget)
    assert suggestion == worst
    kept = quantized(tmp_path, suggestion, dtype=torch.bfloat16)
    assert [name for name, module in kept.named_modules() if type(module) is nn.Linear] == [
        *sorted(worst, key=lambda name: (int(name.split(".")[2]), "mlp" in name)),
        "lm_head",
    ]
    extra = sum(weight_bytes(kept).values()) - before
    assert 0.8 * budget < extra <= budget
    assert mean(layer_errors(reference, kept, BATCHES), "output_snr_db") > mean(errors, "output_snr_db") + 0.5
