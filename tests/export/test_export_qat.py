"""Exports of a run with quant.mode qat: the format that it was trained for, to the bit, and no other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qft.commands.check import planned
from qft.documents.export import ExportDocument, Gate
from qft.documents.plan import PlanDocument
from qft.errors import RecipeError
from qft.export import export
from qft.export.gate.verify import judge, reference
from qft.model.rounded import read_state
from qft.progress import View
from qft.quant.rounding import TARGETS
from qft.recipe import load
from tests.support.architectures import write_model
from tests.support.exports import job_of, options, refusal
from tests.support.families import ATTENTION, write_tiny
from tests.support.models import byte_tokenizer, tiny_llama
from tests.support.once import once
from tests.support.runs import trained

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "more": {"r": 3, "use_dora": True, "bias": "lora_only", "modules_to_save": ["lm_head"]},
    "none": {"kind": "none"},
}
OTHERS = {"int4-g64": "more", "int4-g128": "none", "nf4": "more"}
"""Targets that are trained for otherwise than with a plain adapter."""
STAGES = [{"quant.mode": "none", "max_steps": 3}, {"quant.mode": "qat", "quant.target": "int4-g32", "max_steps": 3}]


def qat_run(folder: Path, target: str, adapter: dict[str, Any], **sections: Any) -> Path:
    """A run of a model with biases, whose rows all groups divide."""
    if not (folder / "base").exists():
        wide = 256 if target == "q4_k" else 128
        model = tiny_llama(hidden_size=wide, intermediate_size=256, attention_bias=True)
        torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias, std=0.1)
        model.save_pretrained(folder / "base")
        byte_tokenizer().save_pretrained(folder / "base")
    train = {"max_steps": 3, "learning_rate": 2e-3 if adapter.get("kind") else 1e-2} | sections.pop("train", {})
    quant = {"mode": "qat", "target": target} | sections.pop("quant", {})
    return trained(folder, folder / "base", quant=quant, adapter=adapter, train=train, **sections)


def exported(run: Path, target: str) -> tuple[ExportDocument, dict[str, Any]]:
    [document] = export(run, options(TARGETS[target].form), View())
    return document, {check.name: check for check in document.gate.checks}


@pytest.mark.parametrize(("target", "kind"), [*((name, OTHERS.get(name, "lora")) for name in TARGETS), ("nf4", "none")])
def test_what_is_written_is_what_was_trained(target: str, kind: str, tmp_path: Path) -> None:
    if TARGETS[target].layer is None:
        pytest.importorskip("cyllama", reason="needs llama.cpp (pip install 'qft[llamacpp]')")
    document, checks = exported(qat_run(tmp_path, target, KINDS[kind]), target)
    assert document.passed
    assert document.quantization is None
    assert (checks["different_weights"].value, checks["different_weights"].threshold) == (0, 0)
    card = (Path(document.path) / "README.md").read_text("utf-8")
    assert f"trained as they are rounded here (quantization-aware training for {target})" in card
    if TARGETS[target].observes:
        assert (checks["different_input_scales"].value, checks["different_input_scales"].passed) == (0, True)
    if TARGETS[target].layer:
        assert checks["largest_difference"].value == 0
        assert (checks["same_continuations"].value, checks["same_continuations"].threshold) == (1, 1)
    else:
        assert checks["kl"].value < 1e-3


def test_an_adapter_that_comes_to_the_rounding_in_stages_is_written_as_it_ended(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    run = trained(tmp_path, tmp_path / "base", quant=None, train={"stages": STAGES})
    document, checks = exported(run, "int4-g32")
    assert document.passed
    exact = ("different_weights", "largest_difference", "same_continuations")
    assert [checks[name].value for name in exact] == [0, 0, 1]


@pytest.mark.parametrize(("target", "learns"), [("int4-g32", True), ("int8", False)])
def test_torchao_holds_the_very_weights_too(target: str, learns: bool, tmp_path: Path) -> None:
    run = qat_run(tmp_path, target, KINDS["lora"], quant={"learn_scales": learns})
    [document] = export(run, options("torchao"), View())
    checks = {check.name: check for check in document.gate.checks}
    assert document.passed
    assert checks["different_weights"].value == 0
    # int8 multiplies with the scales behind the product, which decides between tokens that are as likely.
    limits = (1, 0.95) if target == "int4-g32" else (None, None)
    assert (checks["largest_difference"].value == 0) == (target == "int4-g32")
    assert (checks["same_continuations"].threshold, checks["top1_agreement"].threshold) == limits
    names = {path.suffix for path in Path(document.path).iterdir()}
    assert not names & {".bin", ".pt", ".pth"}, "nothing is pickled"


def test_learnt_scales_are_those_of_the_file(tmp_path: Path) -> None:
    run = qat_run(tmp_path, "w8a8-static", KINDS["none"], quant={"learn_scales": True})
    document, checks = exported(run, "w8a8-static")
    assert document.passed
    assert (checks["different_weights"].value, checks["largest_difference"].value) == (0, 0)
    learnt = read_state(run / "model")
    name = "model.layers.1.mlp.up_proj"
    change = learnt[f"{name}.weight_scale_change"]
    assert change.abs().max() > 0
    [path] = Path(document.path).glob("model-block-*1.safetensors")
    held = load_file(path)[f"{name}.weight_scale"]
    assert torch.equal(held, (learnt[f"{name}.weight_scale"] * (1 + change)).to(held.dtype))


@pytest.mark.parametrize("family", ["gpt_neox", "opt", "mixtral", "gemma3"])
def test_architectures(family: str, tmp_path: Path) -> None:
    """Biases, fused projections, layers around the blocks, routers and fused experts, a tower for pictures, names that
    differ on disk."""
    write = write_tiny if family == "gemma3" else lambda name, folder: write_model(folder, name)
    write(family, tmp_path / "base")
    quant = {"allow_partial": True} if family in ("mixtral", "gemma3") else {}
    document, checks = exported(
        qat_run(
            tmp_path, "int4-g32", {"r": 4, "target_modules": ATTENTION.get(family, ["q_proj", "v_proj"])}, quant=quant
        ),
        "int4-g32",
    )
    assert document.passed
    assert (checks["different_weights"].value, checks["largest_difference"].value) == (0, 0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_holds_the_trained_head_and_embeddings(tied: bool, tmp_path: Path) -> None:
    """All weights are trained, embeddings too, and llama.cpp runs the file."""
    pytest.importorskip("cyllama", reason="needs llama.cpp (pip install 'qft[llamacpp]')")
    write_model(tmp_path / "base", "llama", tie_word_embeddings=tied)
    document, checks = exported(qat_run(tmp_path, "q4_0", KINDS["none"]), "q4_0")
    assert document.passed
    assert checks["different_weights"].value == 0
    assert checks["kl"].value < 1e-3


def test_layers_that_are_left_out_are_left_out_of_the_file(tmp_path: Path) -> None:
    run = qat_run(tmp_path, "int4-g32", {"r": 4}, quant={"skip_modules": ["down_proj"]}, model={"dtype": "float32"})
    document, checks = exported(run, "int4-g32")
    assert checks["largest_difference"].value <= 1e-5
    tensors = {name for path in Path(document.path).glob("*.safetensors") for name in load_file(path)}
    assert "model.layers.0.mlp.up_proj.weight_packed" in tensors
    assert "model.layers.0.mlp.down_proj.weight" in tensors


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "qat", lambda folder: qat_run(folder, "int4-g32", KINDS["lora"])) / "run"


def missed(gate: Gate) -> list[str]:
    return [check.name for check in gate.checks if not check.passed]


def test_the_gate_refuses_a_scale_that_is_off_by_its_last_bit(run: Path, tmp_path: Path) -> None:
    """Closeness is not enough: one group of 32 weights, by less than any prediction shows."""
    export(run, options("compressed-tensors", out=tmp_path / "out"), View())
    job = job_of(run)
    with reference(job, tmp_path) as expected:
        folder = tmp_path / "out" / "compressed-tensors"
        assert judge(job, "compressed-tensors", folder, expected).passed
        [path] = folder.glob("model-block-*1.safetensors")
        tensors = load_file(path)
        scale = tensors["model.layers.1.mlp.up_proj.weight_scale"]
        scale[0, 0] *= 1 + 2**-7
        save_file(tensors, path, {"format": "pt"})
        gate = judge(job, "compressed-tensors", folder, expected)
    assert missed(gate) == ["different_weights"]
    different = next(check.value for check in gate.checks if check.name == "different_weights")
    assert isinstance(different, float)
    assert 0 < different <= 32


def test_the_gate_counts_weights_of_a_gguf_file_that_are_not_those_that_were_trained(tmp_path: Path) -> None:
    pytest.importorskip("cyllama", reason="needs llama.cpp (pip install 'qft[llamacpp]')")
    run = qat_run(tmp_path, "q4_0", KINDS["lora"])
    [document] = export(run, options("gguf-q4_0"), View())
    folder = Path(shutil.copytree(document.path, tmp_path / "copy"))
    [file] = folder.glob("*.gguf")
    held = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.ffn_up.weight")
    block = np.memmap(file, np.uint8, "r+", held.data_offset, (18,))
    block[2] ^= 1  # the code of one weight, and that of no other
    block.flush()
    job = job_of(run)
    with reference(job, tmp_path) as expected:
        gate = judge(job, "gguf-q4_0", folder, expected)
    assert missed(gate) == ["different_weights"]
    assert next(check.value for check in gate.checks if check.name == "different_weights") == 1


@pytest.mark.parametrize("form", ["adapter", "merged", "bnb-4bit", "gguf", "gguf-q4_0"])
def test_other_forms_are_refused_with_the_one_that_it_was_trained_for(form: str, run: Path) -> None:
    told = str(refusal(run, form, gate=False))
    assert "trained for int4-g32 (quant.target)" in told
    assert "export --to compressed-tensors" in told


def test_what_cannot_be_exported_is_not_trained(run: Path, tmp_path: Path) -> None:
    """A Phi is no model that qft writes as a GGUF file."""
    write_model(tmp_path / "phi", "phi")
    sets = [f"model.path={tmp_path / 'phi'}", "quant.target=q8_0", f"output_dir={tmp_path / 'other'}"]
    with pytest.raises(RecipeError, match=r"quant\.target: gguf-q8_0: "):
        planned(load(run.parent / "recipe.yaml", sets))
    plan = planned(load(run.parent / "recipe.yaml", [f"output_dir={tmp_path / 'other'}"]))
    assert isinstance(plan, PlanDocument)
    assert plan.exports is not None
    assert [name for name, obstacle in plan.exports.items() if obstacle is None] == ["compressed-tensors", "torchao"]
    with pytest.raises(RecipeError, match=r"export\.target: merged: .*trained for int4-g32"):
        planned(load(run.parent / "recipe.yaml", [f"output_dir={tmp_path / 'other'}", "export.target=[merged]"]))
