"""quant.mode qat: a loaded model multiplies with the rounded weights of its merge, and nothing else of it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from qft.calibration.layer_errors import layer_errors
from qft.errors import ModelError, QftError
from qft.model.adapter import attach_adapter
from qft.model.load import load_base
from qft.model.merge import MergedWeights
from qft.model.rounded import FILE, read_learnt, read_state, round_weights, write_learnt
from qft.plan import Plan, make_plan
from qft.quant.hold import Qat
from qft.quant.rounded import switch_of, without_rounding
from qft.quant.rounding import TARGETS
from qft.quant.rounding_state import state_of
from qft.recipe.load import from_values
from tests.support.architectures import write_model
from tests.support.models import byte_tokenizer, tiny_llama
from tests.support.rows import chat, write_jsonl

UP = "model.layers.0.mlp.up_proj"
IDS = torch.tensor([[1, 70, 71, 72, 5, 9, 2, 33, 34, 35]])


def plan_of(base: Path, target: str = "int4-g32", **sections: Any) -> Plan:
    rows = write_jsonl(base.parent / "rows.jsonl", [chat(f"say {i}", f"it is {i}") for i in range(8)])
    values: dict[str, Any] = {
        "model": {"path": str(base), "device": "cpu"} | sections.pop("model", {}),
        "quant": {"mode": "qat", "target": target} | sections.pop("quant", {}),
        "data": {"train": str(rows), "max_length": 64},
        "output_dir": str(base.parent / "run"),
    }
    return make_plan(from_values(values | sections))


def attached(plan: Plan) -> Any:
    """The model that is trained, after some training: nothing of its adapter is zero."""
    torch.manual_seed(0)
    model = attach_adapter(load_base(plan.model), plan).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or (parameter.requires_grad and parameter.ndim == 1 and "norm" not in name):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def seen(model: Any, run: Any) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Each module that multiplies or looks up, with what it is given and what it makes of it."""
    calls: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def noted(name: str) -> Any:
        return lambda module, given, made: calls.append((name, given[0], made)) if given else None

    base = getattr(model, "get_base_model", lambda: model)()
    hooks = [module.register_forward_hook(noted(name)) for name, module in base.named_modules() if name]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return iter(calls)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_model(tmp_path / "llama", "llama", tie_word_embeddings=True, attention_bias=True)


ADAPTERS: list[dict[str, Any]] = [
    {"r": 4},
    {"r": 3, "use_rslora": True, "bias": "all"},
    {"r": 4, "use_dora": True},
    {"r": 4, "target_modules": ["q_proj", "up_proj"]},
]
PAIRS = [
    (target, adapter, ("float32", "bfloat16", "float16")[(row + column) % 3])
    for row, target in enumerate(("int4-g32", "nf4", "q4_0"))
    for column, adapter in enumerate(ADAPTERS)
]
"""Every two of target, adapter and dtype."""


@pytest.mark.parametrize(("target", "adapter", "dtype"), PAIRS, ids=str)
def test_a_layer_multiplies_with_the_rounded_merge(
    target: str, adapter: dict[str, Any], dtype: str, llama: Path, tmp_path: Path
) -> None:
    """To the bit what an export finds: merged by its code, from the saved adapter, then rounded."""
    plan = plan_of(llama, target, adapter=adapter, model={"dtype": dtype})
    model = attached(plan)
    model.save_pretrained(tmp_path / "adapter")
    merge = MergedWeights(plan.model, tmp_path / "adapter", dtype, None)
    read, scheme = merge.reader(), plan.model.scheme
    assert isinstance(scheme, Qat)
    roundings = scheme.roundings(plan.model.skeleton)
    linears = {name for name in merge.linears if name != "lm_head"}
    assert roundings.keys() == linears | ({"lm_head", "model.embed_tokens"} if target == "q4_0" else set())

    calls = {name: (given, made) for name, given, made in seen(model, lambda: model(input_ids=IDS))}
    for name in roundings:
        given, made = calls[name]
        weight = roundings[name](read(f"{name}.weight")).values.to(getattr(torch, dtype))
        bias = read(f"{name}.bias") if f"{name}.bias" in merge.known else None
        looked_up = name == "model.embed_tokens"
        expected = functional.embedding(given, weight) if looked_up else functional.linear(given, weight, bias)
        assert torch.equal(made, expected), name


def test_layers_that_share_a_scale_are_rounded_anew_when_another_has_changed(llama: Path, tmp_path: Path) -> None:
    """Of three that are multiplied as one, one is trained, and the scale of all follows its largest weight."""
    plan = plan_of(llama, "nvfp4", adapter={"r": 4, "target_modules": ["q_proj"]}, model={"dtype": "bfloat16"})
    scheme, model = plan.model.scheme, attached(plan)
    assert isinstance(scheme, Qat)
    for scale in (1.0, 40.0):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(scale if "lora_B" in name else 1)
        model.save_pretrained(tmp_path / "adapter")
        merged = MergedWeights(plan.model, tmp_path / "adapter", "bfloat16", None)
        calls = {name: (given, made) for name, given, made in seen(model, lambda: model(input_ids=IDS))}
        for tensors in merged.groups():
            for name, rounding in scheme.settled(scheme.roundings(plan.model.skeleton), tensors).items():
                given, made = calls[name]
                weight = rounding(tensors[f"{name}.weight"]).values
                assert torch.equal(made, functional.linear(given, weight, tensors.get(f"{name}.bias"))), name


def test_all_weights_are_rounded_in_the_dtype_of_the_export(llama: Path) -> None:
    """They are trained in float32, and evaluated and exported in bfloat16 where nothing else is asked."""
    plan = plan_of(llama, adapter={"kind": "none"})
    assert plan.model.dtype == "float32"
    assert plan.model.scheme.dtype == ("bfloat16" if plan.model.device.bf16 else "float32")
    model = attached(plan)
    layer = model.model.layers[0].mlp.up_proj
    inputs = torch.randn(3, 64)
    rounded = TARGETS["int4-g32"].rounding(layer.weight.to(getattr(torch, plan.model.scheme.dtype))).values.float()
    assert torch.equal(layer(inputs), functional.linear(inputs, rounded, layer.bias))


def test_activations_are_rounded_too_where_the_format_has_it(llama: Path) -> None:
    plan = plan_of(llama, "w8a8", model={"dtype": "float32"}, adapter={"r": 4, "lora_alpha": 4})
    layer = attached(plan).get_base_model().model.layers[0].mlp.up_proj
    inputs = torch.randn(1, 5, 64)
    target = TARGETS["w8a8"]
    assert target.inputs is not None
    merged = layer.base_layer.weight + layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = functional.linear(target.inputs(inputs).values, target.rounding(merged).values)
    assert torch.equal(layer(inputs), expected)
    assert not torch.equal(layer(inputs), functional.linear(inputs, target.rounding(merged).values))


def test_what_is_learnt_besides_is_no_part_of_the_state_dict_but_a_file(llama: Path, tmp_path: Path) -> None:
    plan = plan_of(llama, "w8a8-static", quant={"learn_scales": True}, adapter={"r": 4})
    models = [attached(plan), attached(plan)]
    names = [name for name, parameter in models[0].named_parameters() if parameter.requires_grad]
    assert sum("rounding_state" in name for name in names) == 14
    assert not any("rounding_state" in name for name in models[0].state_dict())
    trained = sum(p.numel() for p in models[0].parameters() if p.requires_grad)
    assert plan.model.shape.trainable_parameters == trained
    state = state_of(models[0])
    assert state is not None
    for number, layer in enumerate(state.by_name.values()):
        own = layer.held()
        own["weight_scale_change"].uniform_(-0.2, 0.2)
        own["input_largest"].fill_(0.5 + number)
    write_learnt(models[0], tmp_path)
    with torch.no_grad():
        expected = models[0](input_ids=IDS).logits
        assert not torch.equal(models[1](input_ids=IDS).logits, expected)
        read_learnt(models[1], tmp_path)
        assert torch.equal(models[1](input_ids=IDS).logits, expected)


DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "one is missing": (lambda held: held.pop(f"{UP}.weight_scale"), f"{UP}: weight_scale is missing"),
    "one too many": (lambda held: held.update(other=torch.zeros(1)), "holds other, which no layer has"),
    "of another shape": (
        lambda held: held.update({f"{UP}.weight_scale": torch.ones(3, 1)}),
        f"{UP}: weight_scale is not",
    ),
    "not finite": (lambda held: held[f"{UP}.weight_scale"].fill_(torch.nan), f"{UP}: weight_scale is not .* finite"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_was_learnt_for_another_model_is_refused(case: str, llama: Path, tmp_path: Path) -> None:
    model = attached(plan_of(llama, "int8", quant={"learn_scales": True}, adapter={"r": 4}))
    write_learnt(model, tmp_path)
    damage, message = DAMAGE[case]
    held = read_state(tmp_path)
    damage(held)
    save_file(held, tmp_path / FILE)
    with pytest.raises(ModelError, match=rf"rounding\.safetensors: {message}"):
        read_learnt(model, tmp_path)


def test_layers_left_out_are_merged_and_not_rounded(llama: Path, tmp_path: Path) -> None:
    plan = plan_of(llama, quant={"skip_modules": ["up_proj", "o_proj"]}, adapter={"r": 4})
    model = attached(plan)
    model.save_pretrained(tmp_path / "adapter")
    read = MergedWeights(plan.model, tmp_path / "adapter", "bfloat16", None).reader()
    calls = {name: (given, made) for name, given, made in seen(model, lambda: model(input_ids=IDS))}
    left = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"]
    for name in left:
        given, made = calls[name]
        bias = read(f"{name}.bias") if name.endswith("o_proj") else None
        assert torch.equal(made, functional.linear(given, read(f"{name}.weight"), bias)), name
    assert plan.model.held is not None
    assert plan.model.held.quantized < plan.model.held.total


@pytest.mark.parametrize("target", ["int4-g32", "int8", "nf4", "q4_0", "q8_0"])
def test_the_adapters_gradient_is_that_of_float64(target: str, llama: Path) -> None:
    """Of x (W + s B A)' with W + s B A rounded and straight through, by hand."""
    plan = plan_of(llama, target, model={"dtype": "float32"}, adapter={"r": 4, "lora_alpha": 8})
    layer = attached(plan).get_base_model().model.layers[0].mlp.down_proj.train()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    inputs, upstream = torch.randn(7, 128, requires_grad=True), torch.randn(7, 64)
    found = torch.autograd.grad(layer(inputs), (inputs, a, b), upstream)

    merged = layer.base_layer.weight + 2.0 * (b.detach() @ a.detach())
    values, inside = TARGETS[target].rounding(merged)
    assert inside is None or not inside.all()
    of_weight = (upstream.double().T @ inputs.detach().double()) * (1 if inside is None else inside)
    expected = (upstream.double() @ values.double(), 2 * b.double().T @ of_weight, 2 * of_weight @ a.double().T)
    for given, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(given.double(), wanted, rtol=1e-4, atol=1e-5)


def enable_checkpointing(model: Any) -> None:
    """By the name that this transformers has for it."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": False})


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_checkpointing_changes_no_gradient(kind: str, llama: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        plan = plan_of(llama, adapter={"kind": kind}, train={"gradient_checkpointing": checkpointing})
        model = attached(plan).train()
        if checkpointing:
            enable_checkpointing(model)
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 10
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_what_is_kept_for_an_answer_is_made_anew_after_a_step(llama: Path) -> None:
    model = attached(plan_of(llama, adapter={"r": 4}))
    with torch.no_grad():
        first = model(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, first)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, first)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        assert not torch.equal(model(input_ids=IDS).logits, first)


def test_errors_of_layers_are_those_of_the_rounded_weights(llama: Path) -> None:
    plan = plan_of(llama, adapter={"r": 4})
    model = load_base(plan.model).eval()
    round_weights(model, plan.model)
    batches = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    [error] = [each for each in layer_errors(load_base(plan.model).eval(), model, batches) if "0.mlp.up" in each.name]
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    difference = TARGETS["int4-g32"].rounding(weight).values.float() - weight.float()
    assert error.weight_error == pytest.approx(float(difference.norm() / weight.float().norm()), rel=1e-4)


def test_without_rounding_it_is_the_base(tmp_path: Path) -> None:
    untied = write_model(tmp_path / "untied", "llama")
    plan = plan_of(untied, "q8_0", adapter={"r": 4, "modules_to_save": ["lm_head"]})
    model, base = attached(plan), load_base(plan.model).eval()
    with torch.no_grad(), without_rounding(model):
        assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)
    with torch.no_grad():
        assert not torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)


def test_other_modes_are_left_alone(llama: Path) -> None:
    assert switch_of(attached(plan_of(llama, quant={"mode": "none", "target": None}))) is None


@pytest.mark.parametrize("kind", ["gpt_neox", "phi", "opt"])
def test_architectures(kind: str, tmp_path: Path) -> None:
    """Fused projections, biases, layers around the blocks (which stay as they are, as in the export)."""
    changes = {"word_embed_proj_dim": 32} if kind == "opt" else {}
    plan = plan_of(write_model(tmp_path / kind, kind, **changes), "int4-g32", adapter={"r": 4})
    model, scheme = attached(plan), plan.model.scheme
    assert isinstance(scheme, Qat)
    held = scheme.holds(plan.model.skeleton)
    assert held
    assert all(".layers." in name for name in held)
    with torch.no_grad():
        rounded = model(input_ids=IDS).logits
        switch = switch_of(model)
        assert switch is not None
        switch.on = False
        assert not torch.equal(model(input_ids=IDS).logits, rounded)


REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "rows that groups do not divide": ("llama", {"intermediate_size": 96}, "int4-g64", r"down_proj.* 96 weights.*64"),
    "rows that larger blocks do not divide": ("llama", {"hidden_size": 256}, "q4_k", r"down_proj.* weights.*256"),
    "rows that blocks of 16 do not divide": (
        "llama",
        {"intermediate_size": 72},
        "nvfp4",
        r"down_proj.* 72 weights.*16",
    ),
    "rows that blocks do not divide": ("llama", {"intermediate_size": 80}, "q4_0", r"down_proj.* 80 weights.*32"),
    "transposed layers": ("gpt2", {}, "int4-g32", "quant.target: no linear layer"),
    "layers of a class of their own": ("falcon", {}, "int4-g32", "quant.target: no linear layer"),
    "experts": ("mixtral", {}, "int4-g32", "quant.mode: .*of the weights.*allow_partial"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_rounded_is_refused(case: str, tmp_path: Path) -> None:
    kind, changes, target, message = REFUSED[case]
    with pytest.raises(QftError, match=message):
        plan_of(write_model(tmp_path / "model", kind, **changes), target)


@pytest.mark.parametrize("target", ["mxfp4", "nvfp4"])
def test_floats_that_come_back_in_bfloat16_alone_are_not_trained_in_other_dtypes(target: str, llama: Path) -> None:
    with pytest.raises(QftError, match=r"model\.dtype: .*bfloat16 alone; set it to bfloat16"):
        plan_of(llama, target, model={"dtype": "float32"})
    assert plan_of(llama, target, model={"dtype": "bfloat16"}).model.scheme.dtype == "bfloat16"


def test_a_row_of_any_length_has_its_int8(tmp_path: Path) -> None:
    tiny_llama(intermediate_size=96).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    assert plan_of(tmp_path / "m", "int8").model.scheme.quant_type == "int8"
    with pytest.raises(QftError, match=r"quant\.skip_modules: a q8_0 file holds every matrix so"):
        plan_of(tmp_path / "m", "q8_0", quant={"skip_modules": ["up_proj"]})
