"""Bases that come quantized: held as their files have them, or dequantized and held as the recipe says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qft.commands.abilities import abilities
from qft.errors import ModelError, QftError
from qft.export import export
from qft.model.load import load_base
from qft.plan import ModelPlan, make_plan, plan_model
from qft.progress import View
from qft.quant.stacked import Stacked
from qft.recipe.load import from_values
from tests.support.exports import options
from tests.support.packed import LAYOUTS, packed_model
from tests.support.rows import chat, write_jsonl
from tests.support.runs import trained

IDS = torch.arange(3, 43).view(2, 20)


def values(folder: Path, **model: Any) -> dict[str, Any]:
    section = {"path": str(folder), "device": "cpu", "dtype": "float32"} | model
    return {"model": section, "data": {"train": "-"}, "output_dir": "-"}


def meant_model(plan: ModelPlan, meant: dict[str, torch.Tensor], folder: Path) -> Any:
    """A plain model of the values that the files mean."""
    shutil.copytree(plan.checkpoint.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensors[name] for name, stored in plan.checkpoint.tensors().items() if not stored.packed}
    save_file(kept | meant, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    "layout",
    [
        "gptq",
        "awq",
        "compressed int4",
        "deepseek_v3:compressed int4",
        "mxfp4",
        "torchao int8",
        "torchao int4",
        "torchao fp8",
        "hqq",
        "hqq of 3 bits",
    ],
)
def test_weights_stay_as_they_come_and_multiply_as_what_they_mean(layout: str, tmp_path: Path) -> None:
    meant = packed_model(tmp_path / "model", layout)
    plan = plan_model(from_values(values(tmp_path / "model")), adapted=True)
    held, plain = load_base(plan), meant_model(plan, meant, tmp_path / "plain")
    own = [parameter for parameter in held.parameters() if isinstance(parameter, Stacked)]
    assert sum(parameter.numel() for parameter in own) == sum(weight.numel() for weight in meant.values())
    adapted = []
    for model in (held, plain):
        torch.manual_seed(0)
        adapted.append(get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)))
    losses = [model(IDS, labels=IDS).loss for model in adapted]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    gradients = [{n: p.grad for n, p in model.named_parameters() if p.requires_grad} for model in adapted]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("layout", "dequantize"), [("gptq", False), ("mxfp4", True)])
def test_a_run_is_planned_trained_merged_and_handed_over(layout: str, dequantize: bool, tmp_path: Path) -> None:
    packed_model(tmp_path / "model", layout)
    quant = {"preset": "finetune"} if dequantize else None
    run = trained(tmp_path, tmp_path / "model", model={"dequantize": dequantize}, quant=quant, train={"max_steps": 4})
    report, plan = (json.loads((run / f"{name}.json").read_text()) for name in ("report", "plan"))
    assert report["model"]["quantized_share"] > 0.99
    assert plan["quantization"]["scheme"] == ("4bit" if dequantize else "gptq")
    assert plan["memory"]["unknown"] is None
    merged, *_ = export(run, options("merged"), View())
    assert merged.gate is not None
    assert merged.gate.passed
    config, *_ = run.rglob("merged/config.json")
    assert "quantization_config" not in json.loads(config.read_text())


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("plain", {"dequantize": True}, "its weights are not quantized; remove the field"),
        ("quark", {"dequantize": True}, "quark is none of the methods that are known"),
        ("torchao int8 activations", {}, "have no gradient; set model.dequantize to true"),
        ("awq gemv", {"dequantize": True}, "its version gemv is another layout"),
        ("gptq without scales", {}, "q_proj.weight cannot be dequantized: lacks 'scales'"),
        ("fp8", {}, "set model.dequantize to true"),
        ("compressed int8 activations", {}, "round activations too"),
        ("gptq of nothing", {}, "its files hold no such weight"),
    ],
)
def test_what_cannot_be_read_or_trained_is_refused(
    layout: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    packed_model(tmp_path / "model", next((own for own in sorted(LAYOUTS, key=len)[::-1] if own in layout), "gptq"))
    path, file = tmp_path / "model" / "config.json", tmp_path / "model" / "model.safetensors"
    config = json.loads(path.read_text())
    quantization = config["quantization_config"]
    if layout == "plain":
        del config["quantization_config"]
    elif layout == "quark":
        quantization["quant_method"] = "quark"
    elif layout == "torchao int8 activations":
        quantization["quant_type"]["default"]["_type"] = "Int8DynamicActivationInt8WeightConfig"
    elif layout == "awq gemv":
        quantization["version"] = "gemv"
    elif layout == "compressed int8 activations":
        quantization["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True}
    path.write_text(json.dumps(config))
    gone = {"gptq without scales": ("q_proj.scales",), "gptq of nothing": ("scales", "qweight", "qzeros", "g_idx")}
    if layout in gone:
        kept = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(gone[layout])}
        save_file(kept, file, metadata={"format": "pt"})
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat("say", "it")] * 8)
    with pytest.raises(QftError, match=message):
        make_plan(from_values(values(tmp_path / "model", **changes) | {"data": {"train": str(rows)}}))


def test_there_are_no_original_weights_to_merge_into(tmp_path: Path) -> None:
    packed_model(tmp_path / "model", "awq")
    run = trained(tmp_path, tmp_path / "model", quant=None, train={"max_steps": 1})
    with pytest.raises(ModelError, match="no original ones"):
        export(run, options("merged", merge_into="original"), View())


def test_check_tells_both_ways(tmp_path: Path) -> None:
    packed_model(tmp_path / "model", "gptq")
    found = abilities(str(tmp_path / "model"))
    assert found.train["gptq, as it comes, LoRA"] is None
    assert found.train["4bit LoRA"] is None
    assert "set model.dequantize to true" in str(found.train["all weights"])
    assert found.quantize["4bit"].share == 1
    assert found.exports["merged"] is None
