"""`qft export`: what is handed over is the model that was trained, and what is not is refused."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from jsonschema import Draft202012Validator
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from qft.commands.verify import accept
from qft.documents.export import ExportDocument
from qft.errors import GateError
from qft.export import EXPORTERS, ExportOptions, export
from qft.export.gate.verify import Reference, judge
from qft.export.job import Job
from qft.files import sha256
from qft.model.target import load_target
from qft.progress import View
from qft.recipe.schema import ExportTarget
from tests.support.cli import qft
from tests.support.exports import job_of, options, refusal
from tests.support.forked import ended
from tests.support.models import byte_tokenizer, tiny_llama
from tests.support.runs import trained


def logits(model: Any) -> torch.Tensor:
    ids = byte_tokenizer()("<|im_start|>user\nsay 5<|im_end|>\n<|im_start|>assistant\nit is 35").input_ids
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.tensor([ids])).logits[0].float()
    return found


def test_the_recipe_and_the_table_know_the_same_targets() -> None:
    assert get_args(ExportTarget) == tuple(EXPORTERS)


def test_the_package_gguf_is_asked_for_only_by_who_wants_a_gguf_file() -> None:
    def told() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("qft", "gguf")]:
            del sys.modules[name]
        sys.modules["gguf"] = None  # type: ignore[assignment]
        print(*importlib.import_module("qft.export").EXPORTERS)  # noqa: T201

    done = ended(told)
    assert done.stdout.decode().split() == list(EXPORTERS), done.stderr


def test_every_target_passes_the_gate_and_tells_the_truth_of_its_files(run: Path, tmp_path: Path) -> None:
    able = [name for name in EXPORTERS if name != "gguf-q4_k"]  # whose blocks are longer than the model's rows
    asked = [word for name in able for word in ("--to", name)]
    ran = qft("export", run, *asked, "--out", tmp_path, "--json", "--set", "calibrate.engine=rtn")
    assert ran.exit_code == 0, ran.stderr
    schema = json.loads(qft("schema", "export").stdout)
    documents = json.loads(ran.stdout)
    assert [document["target"] for document in documents] == able
    for document in documents:
        Draft202012Validator(schema).validate(document)
        folder = tmp_path / document["target"]
        assert json.loads((folder / "export.json").read_text()) == document
        assert document["passed"] is True
        files = {p.name: sha256(p) for p in folder.iterdir() if p.name not in ("export.json", "README.md")}
        assert document["sha256"] == files
        assert document["bytes"] == sum((folder / name).stat().st_size for name in files)
        assert document["base"] == json.loads((run / "manifest.json").read_text())["base"]
        original = {"adapter": None, "bnb-4bit": "original"}  # else nf4 would round the adapter away
        assert document["merge_into"] == original.get(document["target"], "dequantized")
        card = (folder / "README.md").read_text()
        metadata = yaml.safe_load(card.split("---")[1])
        library = {"adapter": "peft"}.get(document["target"], "gguf" if has_gguf(folder) else "transformers")
        assert metadata["library_name"] == library
        assert "Passed" in card
        assert all(f"-m {file.name}`" in card for file in folder.glob("*.gguf"))
        assert "and 13" not in card  # no row
        assert all(path.stat().st_mode & 0o044 for path in folder.iterdir())
        told = document["quantization"]
        assert (told is not None) == (document["target"] not in ("adapter", "merged") and not has_gguf(folder))
        assert document["gate"]["engine"] == {"gguf": "llama.cpp"}.get(library, library)
        assert told is None or told["kl"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(able)


def test_targets_of_one_call_share_what_is_merged(run: Path, tmp_path: Path) -> None:
    class Notes(View):
        def __init__(self) -> None:
            self.told: list[str] = []

        def note(self, text: str) -> None:
            self.told.append(text)

    view = Notes()
    rounded = {"overrides": ("calibrate.engine=rtn",), "gate": False}
    export(run, options("bnb-8bit", "compressed-tensors", "bnb-4bit", out=tmp_path, **rounded), view)
    assert view.told.count("Merging") == 2  # bnb-4bit starts from the original weights
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bnb-4bit", "bnb-8bit", "compressed-tensors"]


def has_gguf(folder: Path) -> bool:
    return any(folder.glob("*.gguf"))


def test_dequantized_plus_delta_has_the_logits_of_the_adapter_on_nf4(run: Path, tmp_path: Path) -> None:
    """As near to the same sum without rounding as bfloat16 allows: each weight is rounded once, and nothing else."""
    export(run, options("merged", out=tmp_path), View())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    job = job_of(run)
    exact = unrounded_merge(job, tmp_path / "unrounded")
    for (name, rounded), value in zip(merged.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(rounded, value.to(torch.bfloat16)), name
    as_trained, unrounded, found = logits(load_target(job.target, job.plan)), logits(exact), logits(merged)
    base = logits(load_target(job.without_adapter(), job.plan))
    told = f"largest difference {float((found - as_trained).abs().max()):.4f} of {float(found.abs().max()):.4f}"
    assert rms(found - unrounded) <= 3 * rms(as_trained - unrounded), told
    assert (found - as_trained).abs().max() <= 2**-4 * as_trained.abs().max(), told
    assert rms(base - as_trained) > 50 * rms(found - as_trained), told


def rms(difference: torch.Tensor) -> float:
    return float(difference.square().mean().sqrt())


def unrounded_merge(job: Job, folder: Path) -> Any:
    """The weights that bfloat16 held, with the delta added and everything computed in float32."""
    scheme: Any = job.plan.scheme
    plan = replace(job.plan, scheme=replace(scheme, compute_dtype="float32"))
    folder.mkdir()
    EXPORTERS["merged"].write(replace(job, plan=plan), folder)
    return AutoModelForCausalLM.from_pretrained(folder)


NF4 = {"mode": "4bit"}
KINDS: dict[str, dict[str, Any]] = {
    "rslora, skipped layers": {
        "quant": {"mode": "4bit", "skip_modules": ["up_proj", "model.layers.0.self_attn.q_proj"]},
        "adapter": {"r": 4, "use_rslora": True},
    },
    "dora, fp4 without double quantization": {
        "quant": {"mode": "4bit", "quant_type": "fp4", "double_quant": False},
        "adapter": {"r": 4, "use_dora": True},
    },
    "loftq, a head of its own": {"adapter": {"r": 4, "init_lora_weights": "loftq", "modules_to_save": ["lm_head"]}},
    "pissa": {"quant": None, "adapter": {"r": 4, "init_lora_weights": "pissa"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_nothing_but_rounding_is_left(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    sections = {"model": {"dtype": "float32"}, "quant": NF4, "train": {"max_steps": 4}} | KINDS[kind]
    made = trained(tmp_path, tiny_model, **sections)
    [document] = export(made, options("merged"), View())
    job = job_of(made)
    as_trained = logits(load_target(job.target, job.plan))
    difference = (logits(AutoModelForCausalLM.from_pretrained(document.path)) - as_trained).abs().max()
    assert difference < 1e-4 * as_trained.abs().max()
    assert document.dtype == "float32"


def test_an_int8_base_is_dequantized_as_it_was_held(tiny_model: Path, tmp_path: Path) -> None:
    """Weights, not logits: LLM.int8() rounds activations too, which merged weights do not."""
    made = trained(tmp_path, tiny_model, model={"dtype": "float32"}, quant={"mode": "8bit"})
    [document] = export(made, options("merged"), View())
    assert document.passed
    job = job_of(made)
    model = load_target(job.target, job.plan)
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    held = layer.weight.data.float() * layer.base_layer.weight.SCB[:, None] / 127
    expected = held + layer.get_delta_weight("default")
    found = AutoModelForCausalLM.from_pretrained(document.path).model.layers[1].mlp.down_proj.weight
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_original_weights_are_another_choice(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    [document] = export(run, options("merged", out=tmp_path, merge_into="original"), View())
    assert document.merge_into == "original"
    found = AutoModelForCausalLM.from_pretrained(document.path)
    job = job_of(run)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    expected = PeftModel.from_pretrained(base, job.adapter).merge_and_unload()
    name = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(
        found.get_submodule(name).weight, expected.get_submodule(name).weight, rtol=8e-3, atol=1e-4
    )
    thresholds = {check.name: check.threshold for check in document.gate.checks}
    assert thresholds["kl"] == EXPORTERS["merged"].limits_original.kl


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")
def test_tied_embeddings_stay_tied_unless_one_was_trained(tmp_path: Path) -> None:
    model = tmp_path / "tied"
    tiny_llama(tie_word_embeddings=True).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    for name, adapter in (("kept", {}), ("split", {"modules_to_save": ["lm_head"]})):
        (tmp_path / name).mkdir()
        made = trained(tmp_path / name, model, adapter={"r": 4, **adapter}, train={"max_steps": 1})
        [document] = export(made, options("merged"), View())
        found = AutoModelForCausalLM.from_pretrained(document.path)
        assert (found.lm_head.weight is found.model.embed_tokens.weight) == (name == "kept")


def test_all_weights_are_handed_over_too(tiny_model: Path, tmp_path: Path) -> None:
    hard = {"learning_rate": 1e-3, "max_steps": 3}
    made = trained(tmp_path, tiny_model, quant=None, adapter={"kind": "none"}, train=hard)
    [document] = export(made, options("merged"), View())
    assert document.passed
    assert document.dtype == "bfloat16"
    assert "has no adapter" in str(refusal(made, "adapter"))


# What is broken, and the check that is to see it.


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


def doubled_delta(folder: Path, run: Path) -> None:
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{key}.lora_A.weight" in adapter:
                delta = 4 * adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]
                tensors[name] = (tensors[name].float() + delta).to(tensors[name].dtype)

    rewrite(folder, change)


def swapped_rows(folder: Path, run: Path) -> None:
    """Halves of each head interleaved, as converters between rotary layouts do."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                heads = tensor.reshape(-1, 2, 8, tensor.shape[1])
                tensors[name] = heads.transpose(1, 2).reshape(tensor.shape).contiguous()

    rewrite(folder, change)


def dropped_token(folder: Path, run: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<|im_start|>"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def double_bos(folder: Path, run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    twice = TemplateProcessing(single="<|bos|> <|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer.backend_tokenizer.post_processor = twice
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


def no_template(folder: Path, run: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def other_eos(folder: Path, run: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 7}))


def cut_file(folder: Path, run: Path) -> None:
    path = next(folder.glob("model-block-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1000])


BROKEN: dict[str, tuple[Callable[[Path, Path], None], set[str]]] = {
    "wrong scale": (doubled_delta, {"kl", "top1_agreement", "perplexity_increase"}),
    "swapped q and k rows": (swapped_rows, {"kl", "top1_agreement", "perplexity_increase"}),
    "dropped added token": (dropped_token, {"added_tokens"}),
    "double BOS": (double_bos, {"bos_count"}),
    "no chat template": (no_template, {"chat_template"}),
    "another end of turn": (other_eos, {"eos_token_id"}),
    "a file that is cut": (cut_file, {"loads"}),
}


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    export(run, options("merged", out=out), View())
    return out / "merged"


@pytest.mark.parametrize("way", BROKEN)
def test_a_broken_export_is_caught(
    way: str, run: Path, asked: tuple[Job, Reference], whole: Path, tmp_path: Path
) -> None:
    breaks, seen_by = BROKEN[way]
    folder = tmp_path / "merged"
    shutil.copytree(whole, folder)
    assert judge(asked[0], "merged", folder, asked[1]).passed
    breaks(folder, run)
    gate = judge(asked[0], "merged", folder, asked[1])
    assert gate.passed is False
    missed = {check.name: check.value for check in gate.checks if not check.passed}
    assert missed.keys() & seen_by
    if seen_by & {"kl"}:
        assert "_proj.weight" in str(gate.worst_weight)


def test_a_refused_artifact_is_set_aside_and_an_earlier_one_kept(run: Path, tmp_path: Path) -> None:
    export(run, options("merged", out=tmp_path), View())
    before = sha256(tmp_path / "merged" / "export.json")
    strict = ("--to", "merged", "--out", tmp_path, "--overwrite", "--set", "export.gate.kl=0")
    ran = qft("export", run, *strict)
    assert ran.exit_code == 4
    assert "kl is" in ran.stderr
    assert str(tmp_path / "merged.failed") in ran.stderr
    told = ExportDocument(**json.loads((tmp_path / "merged.failed" / "export.json").read_text()))
    assert told.passed is False
    assert "**Refused**" in (tmp_path / "merged.failed" / "README.md").read_text()
    assert sha256(tmp_path / "merged" / "export.json") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "merged.failed"]
    export(run, options("merged", out=tmp_path, overwrite=True), View())
    assert not (tmp_path / "merged.failed").exists()


def test_the_recipes_thresholds_win(run: Path, tmp_path: Path) -> None:
    given = {"kl": 3.5, "top1_agreement": 0.25, "perplexity_increase": 1.5}
    overrides = tuple(f"export.gate.{check}={value}" for check, value in given.items())
    [document] = export(run, options("merged", out=tmp_path, overrides=overrides), View())
    assert {c.name: c.threshold for c in document.gate.checks}.items() >= given.items()


def test_the_recipe_names_targets_and_weights(tiny_model: Path, tmp_path: Path) -> None:
    section = {"target": ["merged", "adapter"], "merge_into": "original"}
    made = trained(tmp_path, tiny_model, train={"max_steps": 2}, export=section)
    documents = export(made, ExportOptions(), View())
    assert [(d.target, d.merge_into) for d in documents] == [("merged", "original"), ("adapter", None)]
    assert (made / "export" / "merged" / "config.json").is_file()


def test_without_the_gate_that_is_said(run: Path, tmp_path: Path) -> None:
    ran = qft("export", run, "--to", "merged", "--out", tmp_path, "--no-gate")
    assert ran.exit_code == 0
    assert "NOT VERIFIED" in ran.stdout
    assert json.loads((tmp_path / "merged" / "export.json").read_text())["passed"] is None
    assert "**Not verified**" in (tmp_path / "merged" / "README.md").read_text()


def test_the_recipes_calibration_decides_compressed_tensors(run: Path, tmp_path: Path) -> None:
    eight = ("calibrate.preset=w8a16",)
    [document] = export(run, options("compressed-tensors", out=tmp_path, overrides=eight), View())
    assert document.quantization is not None
    assert document.quantization["scheme"]["bits"] == 8
    wrong = ("calibrate.engine=torchao", "calibrate.bits=8")
    error = refusal(run, "compressed-tensors", out=tmp_path, overwrite=True, overrides=wrong)
    assert "calibrate.engine" in str(error)
    strict = ("calibrate.engine=rtn", "calibrate.accept.kl=1e-12")
    error = refusal(run, "compressed-tensors", out=tmp_path / "strict", overrides=strict)
    assert isinstance(error, GateError)
    assert list((tmp_path / "strict").iterdir()) == []


def test_what_cannot_be_done_is_refused_with_one_message(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert "give --to" in str(refusal(run))
    assert "none of adapter, merged" in str(refusal(run, "gguf2"))
    assert "is no run" in str(refusal(tmp_path, "merged"))
    assert "can still be set" in str(refusal(run, "merged", overrides=("train.max_steps=3",)))
    (tmp_path / "merged").mkdir()
    assert "--overwrite" in str(refusal(run, "merged", out=tmp_path))
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    manifest = json.loads((cut / "manifest.json").read_text())
    (cut / "manifest.json").write_text(json.dumps(manifest | {"status": "interrupted"}))
    assert refusal(cut, "merged").exit_code == 7
    (cut / "manifest.json").write_text(json.dumps(manifest))
    config = json.loads((cut / "adapter" / "adapter_config.json").read_text())
    (cut / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"use_qalora": True}))
    assert "adapter_config.json: is not what was written" in str(refusal(cut, "merged"))
    accept(cut)
    assert "use_qalora" in str(refusal(cut, "merged"))
    unquantized = trained(tmp_path, tiny_model, quant=None, train={"max_steps": 1})
    assert "--merge-into" in str(refusal(unquantized, "merged", merge_into="original"))


def test_the_gate_says_which_rows_are_missing(tiny_model: Path, tmp_path: Path) -> None:
    made = trained(tmp_path, tiny_model, train={"max_steps": 1})
    (tmp_path / "rows.jsonl").unlink()
    (made / "rows.jsonl").unlink()  # as in a run of an older version
    assert "--no-gate" in str(refusal(made, "merged"))
    [document] = export(made, options("merged", gate=False), View())
    assert document.passed is None


@pytest.mark.parametrize("fraction", [0.2, 0.0])
def test_the_gate_asks_the_rows_that_the_run_kept(fraction: float, tiny_model: Path, tmp_path: Path) -> None:
    data = {"train": "rows.jsonl", "eval_fraction": fraction, "max_length": 128}
    made = trained(tmp_path, tiny_model, data=data, train={"max_steps": 2})
    kept = (made / "rows.jsonl").read_text().splitlines()
    assert {json.loads(line)["part"] for line in kept} == {"eval" if fraction else "train"}
    [before] = export(made, options("merged"), View())
    (made / "rows.jsonl").rename(tmp_path / "kept.jsonl")
    [encoded_again] = export(made, options("merged", overwrite=True), View())
    (tmp_path / "kept.jsonl").rename(made / "rows.jsonl")
    (tmp_path / "rows.jsonl").unlink()
    [after] = export(made, options("merged", overwrite=True), View())
    assert before.gate.rows == len(kept) == (8 if fraction else 32)
    assert before.gate == encoded_again.gate == after.gate
