"""Families whose checkpoints have other names and shapes than their modules: trained, merged, calibrated, written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qft.checkpoint.layout import unmergeable
from qft.checkpoint.skeleton import without_contents
from qft.checkpoint.weights import tensors_in
from qft.model.load import load_base
from qft.model.merge import MergedWeights
from qft.plan import plan_model
from qft.recipe import load
from tests.support.calibrations import calibrated, perplexity
from tests.support.families import ATTENTION, FAMILIES, write_tiny
from tests.support.once import once
from tests.support.rows import chat, write_jsonl
from tests.support.runs import trained

SHORT = {"max_steps": 2, "learning_rate": 0.02}
IDS = torch.arange(3, 43).unsqueeze(0)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each family."""

    def make(folder: Path) -> None:
        for family in FAMILIES:
            write_tiny(family, folder / family)

    return once(tmp_path_factory, "families", make)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def names_in(folder: Path) -> set[str]:
    return set(tensors_in(folder.glob("*.safetensors")))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_on_nf4_merges_to_what_it_was(family: str, families: Path, tmp_path: Path) -> None:
    adapter = {"r": 4, "target_modules": ATTENTION.get(family, ["q_proj", "v_proj"])}
    held = {
        "preset": "finetune",
        "compute_dtype": "float32",
        "allow_partial": True,
    }  # else 16-bit products differ from those of merged weights
    run = trained(tmp_path, families / family, adapter=adapter, quant=held, model={"dtype": "float32"}, train=SHORT)
    plan = plan_model(load(run / "recipe.yaml"))
    weights = MergedWeights(plan, run / "adapter", "float32", "dequantized")
    weights.write(tmp_path / "merged")

    expected = logits(PeftModel.from_pretrained(load_base(plan), run / "adapter"))
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(logits(load_base(plan)), expected, atol=1e-3)
    assert names_in(tmp_path / "merged") == names_in(families / family)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_alone_is_written_as_it_was(family: str, families: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{path: {families / family}, dtype: float32}}\ndata: {{train: -}}\noutput_dir: run\n")
    plan = plan_model(load(path))
    assert unmergeable(plan.checkpoint, without_contents(plan.checkpoint, plan.recipe.model)) is None
    MergedWeights(plan, None, "float32", None).write(tmp_path / "written")
    original = load_file(families / family / "model.safetensors")
    written: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "written").glob("*.safetensors"):
        written |= load_file(file)
    assert original.keys() == written.keys()
    assert all(torch.equal(original[name], written[name]) for name in original)


HOW = {
    "rtn 4": "engine: rtn, bits: 4, group_size: 32",
    "rtn 8": "engine: rtn, bits: 8, symmetric: true",
    "bitsandbytes": "engine: bitsandbytes, data_type: nf4",
    "torchao": "engine: torchao, bits: 8",
}


@pytest.mark.parametrize(
    ("family", "how"),
    [
        *[("gpt_neox", "rtn 8"), ("gpt_neox", "bitsandbytes")],
        *[("mixtral", "rtn 8"), ("mixtral", "torchao"), ("gemma3", "rtn 4")],
    ],
)
def test_what_is_calibrated_is_what_was_measured(family: str, how: str, families: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat(f"say {i}", f"it is {i}") for i in range(16)])
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{path: {families / family}, device: cpu, dtype: float32}}\n"
        f"data: {{train: {rows}, max_length: 64}}\noutput_dir: {tmp_path / 'run'}\n"
        f"calibrate: {{{HOW[how]}, verify_samples: 4, allow_partial: true}}\n"
    )
    report = calibrated(path)
    assert report.result is not None
    assert perplexity(report, path) == pytest.approx(report.attempts[-1].perplexity.value, rel=1e-3)
    assert report.attempts[-1].perplexity.value != report.perplexity_before.value
    _, info = AutoModelForCausalLM.from_pretrained(report.result, output_loading_info=True)
    assert not info["missing_keys"]
    written = {n for n in names_in(Path(report.result)) if n.endswith(("norm.weight", "w1.weight", "embed_out.weight"))}
    assert written
    if family != "mixtral" or not how.startswith("rtn"):  # which transformers would take for compressed
        assert written <= names_in(families / family)
